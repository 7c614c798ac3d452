"""The training loop: one stream of batches feeds every group of SAEs that this process holds.

The position in the data, the weights, the optimiser's state and the running sums are all that a checkpoint holds, and
rates follow from the step alone, so a run that was killed ends in the same bytes as one that was not. Groups that are
at different steps, because others trained some of them before, share one stream too: it starts where the last of them
is, and the others join when it comes to them. The price is that everything since the last checkpoint is done again.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from gsae import __version__
from gsae.errors import IncompatibleError, InterruptedRun
from gsae.store import Batches, Site
from gsae.train.sae import save_sae

from .checkpoint import load_checkpoint, save_checkpoint
from .config import RunConfig
from .events import Checkpointed, Finished, Left, Listener, Progress, Resampled, Started, Stopped, ignore
from .folder import METRICS, Claim, claimed, group_folder, is_finished, keep_metrics, merge_metrics, settled
from .group import Group, Line, failed
from .inputs import Inputs
from .memory import require_memory
from .process import computing_with, device_of, stop_signals
from .ranks import ALONE, Ranks


def train(site: Site, config: RunConfig, out: Path, listen: Listener = ignore, ranks: Ranks = ALONE) -> None:
    """Train the run's SAEs on the site's rows into the folder `out`, or go on where earlier calls stopped.

    Inputs are z = scale * x with E||z||^2 = 1 over the rows within the norm limit. Leaves `config.toml`,
    `metrics.jsonl`, `state/` and `saes/<name>/` (SAELens's layout, for raw x). A finished run is left as it is. One
    process takes all groups that nobody holds, side by side; of several ranks each takes one after the other.

    Raises IncompatibleError for a folder of another run, other settings or another store, or when others hold all that
    is left; InterruptedRun, after a checkpoint, on SIGTERM or SIGINT; SpaceError, CorruptError and UsageError as their
    names say.
    """
    inputs = Inputs.of(site, config, "cpu")
    require_memory(site, config.resolved(device=device_of(config), threads=1, ranks=ranks.world_size), ranks)
    run = settled(out, config, site, ranks)
    device = ranks.device(str(run.device), torch.cuda.device_count())
    inputs = Inputs.of(site, run, device)
    own = _Run(site, run, out, inputs, listen)
    trained = 0
    with stop_signals() as stop, computing_with(cast(int, run.threads), run.precision):
        for claims in _work(own, ranks):
            try:
                own.train(claims, stop, ranks)
                trained += len(claims)
            finally:
                for claim in claims:
                    claim.release()
    left = own.unfinished()
    merge_metrics(out, run)
    if left and not trained and ranks.alone:
        raise IncompatibleError(f"Another process is training in {out}; wait for it or stop it.")
    listen(Left(len(left)) if left else Finished(run.steps, not trained, tuple(own.failed())))


def _work(own: "_Run", ranks: Ranks) -> Iterator[list[Claim]]:
    """What this process is to train: all groups it can have at once, or, of several ranks, one after the other."""
    while True:
        claims = []
        for number in own.unfinished():
            claim = claimed(own.out, number)
            if claim is not None and is_finished(own.out, own.run, number):  # meanwhile, by another
                claim.release()
                continue
            if claim is not None:
                claims.append(claim)
            if claims and not ranks.alone:
                break
        if not claims:
            return
        yield claims


@dataclass(frozen=True)
class _Held:
    """A group that this process trains, and its open metrics file."""

    group: Group
    folder: Path
    metrics: BinaryIO


class _Run:
    """What stays the same while a process trains."""

    def __init__(self, site: Site, run: RunConfig, out: Path, inputs: Inputs, listen: Listener) -> None:
        self.site, self.run, self.out, self.inputs, self.listen = site, run, out, inputs, listen
        self._heldout: tuple[Tensor | None] | None = None

    def unfinished(self) -> list[int]:
        """The groups that are not at their end."""
        return [n for n in range(len(self.run.groups())) if not is_finished(self.out, self.run, n)]

    def failed(self) -> dict[str, int]:
        """The SAEs of the run that were stopped, in the run's order."""
        found: dict[str, int] = {}
        for number, saes in enumerate(self.run.groups()):
            state = load_checkpoint(group_folder(self.out, number), only=("stopped",))
            if state is not None:
                found |= failed(saes, state.tensors["stopped"])
        return {str(s.name): found[str(s.name)] for s in self.run.saes if s.name in found}

    def train(self, claims: list[Claim], stop: list[int], ranks: Ranks) -> None:
        """Train some groups to their end and save their SAEs."""
        held = [self._open(claim) for claim in claims]
        try:
            self._announce(held, ranks)
            self._loop(held, stop)
        finally:
            for one in held:
                one.metrics.close()
        for one in held:
            self._save_saes(one.group)

    def _open(self, claim: Claim) -> _Held:
        group = Group(claim.number, self.run.groups()[claim.number], self.run, self.inputs)
        saved = load_checkpoint(claim.folder)
        if saved is not None:
            group.restore(saved)
        keep_metrics(claim.folder, saved.metrics_bytes if saved else 0)
        return _Held(group, claim.folder, (claim.folder / METRICS).open("ab"))

    def _announce(self, held: list[_Held], ranks: Ranks) -> None:
        run, summary = self.run, self.inputs.summary
        self.listen(
            Started(
                step=min(one.group.step for one in held),
                steps=run.steps,
                saes=tuple(name for one in held for name in one.group.names),
                groups=len(held),
                rows=summary.rows,
                rows_skipped=summary.skipped,
                rows_nonfinite=self.site.moments.non_finite,
                epochs=run.steps * run.batch_size / summary.rows,
                device=str(self.inputs.device),
                threads=cast(int, run.threads),
                ranks=ranks.world_size,
            )
        )

    def _loop(self, held: list[_Held], stop: list[int]) -> None:
        run = self.run
        known = {name for one in held for name in one.group.failed()}
        first = min(held, key=lambda one: one.group.step).group
        saved_at = time.monotonic()
        with self._batches(first.reader) as batches:
            clock = _Clock(batches, first.step)
            for step in range(first.step + 1, run.steps + 1):
                rows = next(batches)
                x = self.inputs.scaled(rows) - self.inputs.centre
                spread = x.square().sum(dtype=torch.float64)
                active = [one for one in held if one.group.step == step - 1]
                for one in active:
                    one.group.advance(x, spread, batches.state_dict())
                if step in run.resample_at:
                    self._resample(active, step)
                last = step == run.steps
                if last or step % run.log_every == 0:
                    self._log(active, step, clock, known)
                overdue = time.monotonic() - saved_at >= 60 * run.checkpoint_minutes
                if last or stop or overdue or step % run.checkpoint_every == 0:
                    self._save(active, step)
                    saved_at = time.monotonic()
                if stop and not last:
                    where = f"after step {step} of {run.steps}; the same command goes on from there"
                    raise InterruptedRun(f"Stopped by {signal.Signals(stop[0]).name} {where}.", 128 + stop[0])

    def _batches(self, position: dict[str, int] | None) -> Batches:
        return self.site.batches(
            self.run.batch_size,
            seed=self.run.data_seed,
            epochs=None,
            max_norm_multiple=self.run.max_norm_multiple,
            device=self.inputs.device,  # to a GPU, batches are copied while the step before computes
            state=position,
        )

    def _resample(self, active: list[_Held], step: int) -> None:
        z = self.inputs.to_resample_from(self.run, step)
        for one in active:
            for name, latents in one.group.resample(z).items():
                self.listen(Resampled(step, name, latents))

    def _log(self, active: list[_Held], step: int, clock: "_Clock", known: set[str]) -> None:
        heldout = self._heldout_rows() if self._evaluates(step) else None
        found: dict[str, Line] = {}
        for one in active:
            lines = one.group.metrics(heldout)
            one.metrics.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())
            one.metrics.flush()
            found |= {line["sae"]: line for line in lines}
            for name, at in one.group.failed().items():
                if name not in known:
                    known.add(name)
                    self.listen(Stopped(at, name))
        lines = [found[str(sae.name)] for sae in self.run.saes if sae.name in found]
        rows = step * self.run.batch_size
        rates = clock.rates(step, self.run.batch_size)
        self.listen(Progress(step, self.run.steps, rows, *rates, tuple(lines)))

    def _evaluates(self, step: int) -> bool:
        """Whether held-out rows are due with the metrics of a step: since the line before, or at the end."""
        every, before = self.run.eval_every, (step - 1) // self.run.log_every * self.run.log_every
        return bool(every) and (step == self.run.steps or step // every > before // every)

    def _heldout_rows(self) -> Tensor | None:
        if self._heldout is None:
            self._heldout = (self.inputs.heldout(self.run.eval_rows),)
        return self._heldout[0]

    def _save(self, active: list[_Held], step: int) -> None:
        for one in active:
            os.fsync(one.metrics.fileno())
            save_checkpoint(one.folder, one.group.checkpoint(one.metrics.tell()))
        merge_metrics(self.out, self.run)
        self.listen(Checkpointed(step))

    def _save_saes(self, group: Group) -> None:
        run, summary, stopped = self.run, self.inputs.summary, group.failed()
        for index, (sae, dead) in enumerate(zip(group.saes, group.dead(), strict=True)):
            if sae.name in stopped:
                continue
            noted = {
                "version": __version__,
                "name": sae.name,
                "architecture": sae.kind,
                "l1_coefficient": sae.l1_coefficient,
                "lr": sae.lr,
                "seed": sae.seed,
                "init_sha256": sae.init_sha256,
                "data_seed": run.data_seed,
                "steps": run.steps,
                "batch_size": run.batch_size,
                "rows": run.steps * run.batch_size,
                "site": self.site.name,
                "store_digest": self.site.store.digest,
                "scale": self.inputs.scale,
                "max_norm_multiple": run.max_norm_multiple,
                "norm_limit": summary.norm_limit,
                "dead": dead,
                "dead_rows": group.dead_rows,
                "precision": run.precision,
            }
            save_sae(
                self.out / "saes" / str(sae.name),
                group.bank.one(index),
                scale=self.inputs.scale,
                site=self.site.spec,
                plan=self.site.store.plan,
                gsae=noted,
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
