"""The training loop: one stream of batches feeds every SAE of the run.

The position in the data, the weights, the second moments and the running sums are all that a checkpoint holds, and
rates follow from the step alone, so a run that was killed ends in the same bytes as one that was not. The price is
that everything since the last checkpoint is done again.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch

from gsae import __version__
from gsae.store import Batches, InterruptedRun, Site

from .bank import kernel_threads
from .checkpoint import load_checkpoint, save_checkpoint, save_sae
from .config import RunConfig
from .events import Checkpointed, Finished, Listener, Progress, Started, Stopped, ignore
from .folder import METRICS, held, keep_metrics, settled
from .state import Group, State


def train(site: Site, config: RunConfig, out: Path, listen: Listener = ignore) -> None:
    """Train the run's SAEs on the site's rows into the folder `out`, or go on where an earlier call stopped.

    Inputs are z = scale * x with E||z||^2 = 1 over the rows within the norm limit. Leaves `config.toml`,
    `metrics.jsonl`, `state/` and `saes/<name>/` (SAELens's layout, for raw x). A finished run is left as it is.

    Raises IncompatibleError for a folder of another run, other settings or another store; InterruptedRun, after a
    checkpoint, on SIGTERM or SIGINT; SpaceError, CorruptError and UsageError as their names say.
    """
    with held(out), _stop_signals() as stop:
        run = settled(out, config, site)
        with _threads(cast(int, run.threads)):
            state = State(site, run)
            saved = load_checkpoint(out)
            if saved is not None:
                state.restore(saved, site.store.digest)
            already = state.step == run.steps and not _unsaved(out, run, state)
            if not already:
                keep_metrics(out, saved.metrics_bytes if saved else 0)
                _loop(site, run, out, state, stop, listen)
                for group in state.groups:
                    _save_saes(site, run, out, state, group)
            listen(Finished(state.step, already, tuple(state.stopped())))


def _loop(site: Site, run: RunConfig, out: Path, state: State, stop: list[int], listen: Listener) -> None:
    summary, stopped = state.summary, state.stopped()
    names = tuple(str(sae.name) for sae in run.saes)
    epochs = run.steps * run.batch_size / summary.rows
    listen(Started(state.step, run.steps, names, summary.rows, summary.skipped, epochs))
    if state.step == run.steps:
        return
    with (out / METRICS).open("ab") as metrics, _batches(site, run, state) as batches:
        clock = _Clock(batches, state.step)
        while state.step < run.steps:
            rows = next(batches)
            state.advance(rows, batches.state_dict(), run)
            last = state.step == run.steps
            if last or state.step % run.log_every == 0:
                lines = state.metrics(run)
                metrics.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())
                metrics.flush()
                for name in state.stopped().keys() - stopped:
                    listen(Stopped(state.stopped()[name], name))
                stopped = state.stopped()
                seen = state.step * run.batch_size
                listen(Progress(state.step, run.steps, seen, *clock.rates(state.step, run.batch_size), lines))
            if last or stop or state.step % run.checkpoint_every == 0:
                os.fsync(metrics.fileno())
                save_checkpoint(out, state.checkpoint(site.store.digest, metrics.tell()))
                listen(Checkpointed(state.step))
            if stop and not last:
                where = f"after step {state.step} of {run.steps}; the same command goes on from there"
                raise InterruptedRun(f"Stopped by {signal.Signals(stop[0]).name} {where}.", 128 + stop[0])


def _batches(site: Site, run: RunConfig, state: State) -> Batches:
    return site.batches(
        run.batch_size,
        seed=run.data_seed,
        epochs=None,
        max_norm_multiple=run.max_norm_multiple,
        device=state.device,  # to a GPU, batches are copied while the step before computes
        state=state.reader,
    )


class _Clock:
    """Rates since the last asking, for the person watching; nothing that is saved depends on it."""

    def __init__(self, batches: Batches, step: int) -> None:
        self.batches = batches
        self.then = time.perf_counter(), batches.wait_seconds, step

    def rates(self, step: int, batch_size: int) -> tuple[float, float]:
        """Rows per second, and the share of the time that was spent waiting for data."""
        now = time.perf_counter(), self.batches.wait_seconds, step
        seconds, waited, steps = (b - a for a, b in zip(self.then, now, strict=True))
        self.then = now
        return steps * batch_size / max(seconds, 1e-9), waited / max(seconds, 1e-9)


def _unsaved(out: Path, run: RunConfig, state: State) -> list[str]:
    names = [str(sae.name) for sae in run.saes if sae.name not in state.stopped()]
    return [name for name in names if not (out / "saes" / name / "cfg.json").exists()]


def _save_saes(site: Site, run: RunConfig, out: Path, state: State, group: Group) -> None:
    stopped = state.stopped()
    for index, (sae, dead) in enumerate(zip(group.saes, state.dead(group), strict=True)):
        if sae.name in stopped:
            continue
        noted = {
            "version": __version__,
            "name": sae.name,
            "architecture": sae.arch,
            "l1_coefficient": sae.l1_coefficient,
            "lr": sae.lr,
            "seed": sae.seed,
            "data_seed": run.data_seed,
            "steps": run.steps,
            "batch_size": run.batch_size,
            "rows": run.steps * run.batch_size,
            "site": site.name,
            "store_digest": site.store.digest,
            "scale": state.scale,
            "max_norm_multiple": run.max_norm_multiple,
            "norm_limit": state.summary.norm_limit,
            "dead": dead,
            "dead_rows": state.dead_rows,
            "precision": run.precision,
        }
        folder = out / "saes" / str(sae.name)
        save_sae(folder, group.bank.one(index), scale=state.scale, site=site.spec, plan=site.store.plan, gsae=noted)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT, in the main thread, instead of dying of them; the old handlers come back after."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, lambda number, _: caught.append(number)) for kind in kinds]
    try:
        yield caught
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads: sums of a matrix product may depend on it, so the run records it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with kernel_threads(count):
            yield
    finally:
        torch.set_num_threads(before)
