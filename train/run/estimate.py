"""What a run would need: parameters, memory, work, time, and the rate at which rows must be read.

Time is measured: some steps of every group on real rows, as at the start of a run (half of all gates open) and with
about 50 open latents per row. This takes a few seconds; large steps are measured on fewer rows.
"""

import time
from typing import Any

import torch
from torch import Tensor

from gsae.store import Site
from gsae.train.step.wide import wide

from .computing import computing_with, device_of
from .config import ResolvedRun, ResolvedSAE, RunConfig
from .group import Group
from .inputs import Inputs
from .memory import available_bytes, needed_bytes, parameters, reading_bytes
from .ranks import ALONE, Ranks

PROBE_FLOPS = 1e11  # a step with more is measured on fewer rows
PROBE_STEPS, SETTLING_STEPS = 2, 6
PROBE_L0 = 50


def estimate(site: Site, config: RunConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Return what `--dry-run` prints for a run on `site`, in bytes, flops, rows and seconds."""
    run = config.resolved(device=device_of(config), threads=ranks.threads, ranks=ranks.world_size)
    inputs = Inputs.of(site, run).to(run.device)
    summary = inputs.summary
    need, there = needed_bytes(site, run, ranks), available_bytes(run.device)
    flops = _dense_flops(run.saes, run, site.d_in)
    read = run.batch_size * site.raw_bytes // site.rows
    return {
        "site": site.name,
        "store_digest": site.store.digest,
        "rows": summary.rows,
        "rows_skipped": summary.skipped,
        "rows_nonfinite": site.moments.non_finite,
        "batch_size": run.batch_size,
        "steps": run.steps,
        "epochs": run.steps * run.batch_size / summary.rows,
        "device": run.device,
        "threads": run.threads,
        "groups": len(run.groups()),
        "learning_rates": {sae.name: sae.lr for sae in run.saes},
        "parameters": {sae.name: parameters(sae, site.d_in) for sae in run.saes},
        "memory_bytes": need,
        "available_bytes": there,
        "reading_memory_bytes": reading_bytes(site, run),
        "flops_per_step": flops,  # of dense steps
        "flops": flops * run.steps,
        "bytes_read_per_step": read,
        **(_measured(run, inputs, read, ranks) if need <= there else {}),
    }


def _dense_flops(saes: tuple[ResolvedSAE, ...], run: ResolvedRun, d_in: int) -> int:
    """Flops of the matrix products of a dense step of some SAEs."""
    return sum(2 * s.architecture.PRODUCTS * run.batch_size * s.d_sae * d_in for s in saes)


def _measured(run: ResolvedRun, inputs: Inputs, read: int, ranks: Ranks) -> dict[str, Any]:
    """Seconds of a step, and what follows from them, if every rank has the same share of the groups."""
    with computing_with(run.threads):
        pairs = [_step_seconds(number, run, inputs) for number in range(len(run.groups()))]
    dense, sparse = (sum(column) / ranks.world_size for column in zip(*pairs, strict=True))
    dense_steps = min(run.l1_warm_up_steps, run.steps)
    return {
        "measured_step_seconds_at_the_start": dense,
        f"measured_step_seconds_at_l0_{PROBE_L0}": sparse,
        "expected_seconds": dense_steps * dense + (run.steps - dense_steps) * sparse,
        "read_bytes_per_second_needed": read / sparse,
    }


def _step_seconds(number: int, run: ResolvedRun, inputs: Inputs) -> tuple[float, float]:
    """Seconds of a step of a group with half of its gates open, and with `PROBE_L0` open per row."""
    saes = run.groups()[number]
    rows = max(1, round(run.batch_size * min(1.0, PROBE_FLOPS / _dense_flops(saes, run, inputs.site.d_in))))
    group = Group(number, tuple(sae.model_copy(update={"init": None}) for sae in saes), run, inputs)
    with inputs.site.batches(rows, epochs=None, max_norm_multiple=run.max_norm_multiple, device=inputs.device) as found:
        x = inputs.scaled(next(found)) - inputs.centre
    _run_steps(group, x, 1)
    dense = _run_steps(group, x, PROBE_STEPS)
    gates = group.bank.params[saes[0].architecture.GATE]
    for index in range(len(saes)):
        opened = x[:64] @ group.bank.params["W_enc"][index].T
        most = min(PROBE_L0 * len(opened), opened.numel())
        gates[index] = -torch.topk(opened.flatten(), most).values[-1]
    _run_steps(group, x, SETTLING_STEPS)
    sparse = _run_steps(group, x, PROBE_STEPS)
    scale = run.batch_size / rows
    return dense * scale, sparse * scale


def _run_steps(group: Group, x: Tensor, steps: int) -> float:
    """Take some steps on one batch; return the mean time of one in seconds."""
    spread = x.square().sum(dtype=wide(x.device))
    started = time.perf_counter()
    for _ in range(steps):
        group.advance(x, spread, {})
        group.failed()  # waits for the device
    return (time.perf_counter() - started) / steps
