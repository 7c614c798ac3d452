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

from .computing import computing_with, resolved_here
from .config import ResolvedRun, ResolvedSAE, RunConfig
from .fitting import Room, best_room
from .group import Group
from .inputs import Inputs
from .memory import checkpoint_bytes, parameters, reading_bytes, saved_bytes
from .memory_errors import memory_errors
from .ranks import ALONE, Ranks

PROBE_FLOPS = 1e11  # a step with more is measured on fewer rows
PROBE_STEPS, SETTLING_STEPS = 2, 6
LOOKED = 16  # steps after which a GPU has looked whether to change to the sparse one
PROBE_L0 = 50


def estimate(site: Site, config: RunConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Return what `--dry-run` prints for a new run on `site`, in bytes, flops, rows and seconds; writes nothing.

    `refusal` says why the run would not start for want of memory, and is None if it would. A figure of the host is None
    if the device has the same memory.
    """
    run = resolved_here(config, ranks)
    room = best_room(site, run, ranks, cut=config.stack is None)
    run, need, refusal = room.run, room.needed(ranks), room.refusal(ranks)
    inputs = Inputs.of(site, run).to(run.device)
    summary = inputs.summary
    passes = len(room.parts()) if ranks.alone else -(-len(room.groups) // ranks.world_size)
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
        "saes": len(run.saes),
        "stack": run.stack,
        "groups": _groups(room, site, ranks),
        "trainings": passes,  # one after the other, each with its own pass over the rows
        "learning_rates": {sae.name: sae.lr for sae in run.saes},
        "parameters": {sae.name: parameters(sae, site.d_in) for sae in run.saes},
        "memory_bytes": need.device,
        "available_bytes": room.there.device,
        "host_memory_bytes": need.host or None,
        "host_available_bytes": room.there.host or None,
        "reading_memory_bytes": reading_bytes(site, run),
        "checkpoint_bytes": sum(checkpoint_bytes(saes, site.d_in, run) for saes in room.groups),
        "saved_bytes": sum(saved_bytes(sae, site.d_in) for sae in run.saes),
        "refusal": refusal,
        "flops_per_step": flops,  # of dense steps
        "flops": flops * run.steps,
        "bytes_read_per_step": read,
        **(_measured(run, inputs, read * passes, ranks) if refusal is None else {}),
    }


def _groups(room: Room, site: Site, ranks: Ranks) -> list[dict[str, Any]]:
    """A line for each group. training: in which of several trainings one after the other; None for ranks' queue."""
    place = {number: at for at, part in enumerate(room.parts(), 1) for number in part}
    return [
        {
            "group": number,
            "architecture": saes[0].kind,
            "d_sae": saes[0].d_sae,
            "saes": len(saes),
            "memory_bytes": need.device,
            "host_memory_bytes": need.host or None,
            "checkpoint_bytes": checkpoint_bytes(saes, site.d_in, room.run),
            "training": place[number] if ranks.alone else None,
        }
        for number, (saes, need) in enumerate(zip(room.groups, room.needs, strict=True))
    ]


def _dense_flops(saes: tuple[ResolvedSAE, ...], run: ResolvedRun, d_in: int) -> int:
    """Flops of the matrix products of a dense step of some SAEs."""
    return sum(2 * s.architecture.PRODUCTS * run.batch_size * s.d_sae * d_in for s in saes)


def _measured(run: ResolvedRun, inputs: Inputs, read: int, ranks: Ranks) -> dict[str, Any]:
    """Seconds of a step, and what follows from them, if every rank has the same share of the groups."""
    with computing_with(run.threads, run.device), memory_errors(run, run.groups()):
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
    _run_steps(group, x, LOOKED if run.sparse_share else SETTLING_STEPS)
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
