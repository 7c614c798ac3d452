"""The training loop: one stream of batches feeds every group of SAEs that this process holds.

A checkpoint holds the position in the data, the weights, the optimiser state and the running sums. Rates follow from
the step alone, so a run that was killed ends in the same bytes as one that was not; what came after the last checkpoint
is computed again. Groups at different steps, because other processes trained some of them before, share one stream: it
starts where the least advanced group is, and the others join when it reaches them.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from gsae import __version__
from gsae.errors import IncompatibleError, InterruptedRun
from gsae.store import Batches, Site
from gsae.train.sae import save_sae
from gsae.train.sae_metadata import SAEMetadata

from .checkpoint import load_checkpoint
from .checkpoint_writer import CheckpointWriter, Unsaved
from .computing import computing_with
from .config import ResolvedRun, RunConfig
from .events import Checkpointed, Diverged, Finished, Left, Listener, Progress, Resampled, Started, ignore
from .fitting import Room, require_room
from .folder import Claim, begin_or_resume, claim_group, is_finished
from .group import Group, failed
from .inputs import Inputs
from .memory_errors import memory_errors
from .metrics_files import METRICS, group_folder, merge_metrics, truncate_metrics
from .metrics_line import MetricsLine
from .ranks import ALONE, Ranks
from .stop_signals import stop_signals


def train(site: Site, config: RunConfig, out: Path, listen: Listener = ignore, ranks: Ranks = ALONE) -> None:
    """Train the SAEs of a run on the rows of a site into the folder `out`, or resume where earlier calls stopped.

    Inputs are z = scale * x with E||z||^2 = 1 over the rows within the norm limit. Leaves `config.toml`,
    `metrics.jsonl`, `state/` and `saes/<name>/` (SAELens's layout, for raw x). A finished run is left unchanged. A
    single process trains all groups that no other holds, as many at a time as fit in memory; each of several ranks
    trains one after the other.

    Raises IncompatibleError for a folder of another run, other settings or another store, or if other processes hold
    all groups that are left; InterruptedRun, after a checkpoint, on SIGTERM or SIGINT; SpaceError without enough memory
    or disk; CorruptError for a damaged checkpoint; UsageError for rows that cannot be trained on.
    """
    inputs = Inputs.of(site, config)
    run = begin_or_resume(out, config, site, ranks, listen)
    trainer = _Trainer(run, out, inputs.to(ranks.device(run.device, torch.cuda.device_count())), listen)
    trained = 0
    if trainer.unfinished():
        require_room(site, run, ranks)
    with stop_signals() as stop, computing_with(run.threads, str(trainer.inputs.device)):
        for claims, later in _claims(trainer, ranks):
            try:
                trainer.train(claims, later, stop, ranks)
                trained += len(claims)
            finally:
                for claim in claims:
                    claim.release()
    left = trainer.unfinished()
    merge_metrics(out, run)
    if left and not trained and ranks.alone:
        raise IncompatibleError(f"Another process is training in {out}; wait for it or stop it.")
    listen(Left(len(left)) if left else Finished(run.steps, not trained, tuple(trainer.failed())))


def _claims(trainer: "_Trainer", ranks: Ranks) -> Iterator[tuple[list[Claim], int]]:
    """The groups to train next, and how many follow because all do not fit: one group for each of several ranks."""
    while unfinished := trainer.unfinished():
        claims, later = list[Claim](), 0
        room = Room.of(trainer.site, trainer.run)
        for number in unfinished:
            if claims and not (ranks.alone and room.fits([*(claim.number for claim in claims), number])):
                later += ranks.alone
                continue
            claim = claim_group(trainer.out, number)
            if claim is not None and is_finished(trainer.out, trainer.run, number):  # meanwhile, by another process
                claim.release()
                continue
            if claim is not None:
                claims.append(claim)
        if not claims:
            return
        yield claims, later


@dataclass(frozen=True)
class _HeldGroup:
    """A group that this process trains, its folder and its open metrics file."""

    group: Group
    folder: Path
    metrics: BinaryIO


class _Trainer:
    """The loop of one process, and what stays the same while it runs."""

    def __init__(self, run: ResolvedRun, out: Path, inputs: Inputs, listen: Listener) -> None:
        self.site, self.run, self.out, self.inputs, self.listen = inputs.site, run, out, inputs, listen
        self._heldout: tuple[Tensor | None] | None = None

    def unfinished(self) -> list[int]:
        """The numbers of the groups that are not complete."""
        return [n for n in range(len(self.run.groups())) if not is_finished(self.out, self.run, n)]

    def failed(self) -> dict[str, int]:
        """The SAEs of the run that were stopped, in the order of the run, and the step of each."""
        found: dict[str, int] = {}
        for number, saes in enumerate(self.run.groups()):
            state = load_checkpoint(group_folder(self.out, number), only=("stopped",))
            if state is not None:
                found |= failed(saes, state.tensors["stopped"])
        return {sae.name: found[sae.name] for sae in self.run.saes if sae.name in found}

    def train(self, claims: list[Claim], later: int, stop: list[int], ranks: Ranks) -> None:
        """Train some groups to their end and save their SAEs. later: how many follow. stop: the signals caught."""
        groups = self.run.groups()
        with memory_errors(self.run, [groups[claim.number] for claim in claims]), ExitStack() as opened:
            held = [self._open(claim, opened) for claim in claims]
            self._announce(held, later, ranks)
            self._loop(held, stop)
            for one in held:
                self._save_saes(one.group)

    def _open(self, claim: Claim, opened: ExitStack) -> _HeldGroup:
        group = Group(claim.number, self.run.groups()[claim.number], self.run, self.inputs)
        saved = load_checkpoint(claim.folder)
        if saved is not None:
            group.restore(saved)
        truncate_metrics(claim.folder, saved.metrics_bytes if saved else 0)
        return _HeldGroup(group, claim.folder, opened.enter_context((claim.folder / METRICS).open("ab")))

    def _announce(self, held: list[_HeldGroup], later: int, ranks: Ranks) -> None:
        run, summary = self.run, self.inputs.summary
        self.listen(
            Started(
                step=min(one.group.step for one in held),
                steps=run.steps,
                saes=tuple(name for one in held for name in one.group.names),
                groups=len(held),
                later=later,
                rows=summary.rows,
                rows_skipped=summary.skipped,
                rows_nonfinite=self.site.moments.non_finite,
                epochs=run.steps * run.batch_size / summary.rows,
                device=str(self.inputs.device),
                threads=run.threads,
                ranks=ranks.world_size,
            )
        )

    def _loop(self, held: list[_HeldGroup], stop: list[int]) -> None:
        run = self.run
        first = min(held, key=lambda one: one.group.step).group
        saved_at = time.monotonic()
        with self._batches(first.reader) as batches, CheckpointWriter(self.inputs.device) as writer:
            clock = _Clock(batches, first.step)
            for step in range(first.step + 1, run.steps + 1):
                rows = next(batches)
                x, spread = self.inputs.centred(rows, run.kernels)
                active = [one for one in held if one.group.step == step - 1]
                for one in active:
                    one.group.advance(x, spread, batches.state_dict())
                if step in run.resample_at:
                    self._resample(active, step)
                last = step == run.steps
                if last or step % run.log_every == 0:
                    self._log(active, step, clock)
                overdue = time.monotonic() - saved_at >= 60 * run.checkpoint_minutes
                stopping = bool(stop)  # asked once, so that a run stops after a checkpoint of this very step
                if stopping or overdue or run.is_checkpoint(step):
                    self._settle(writer, wait=True)
                    self._begin_to_save(writer, active, step)
                    saved_at = time.monotonic()
                self._settle(writer, wait=last or stopping)
                if stopping and not last:
                    where = f"after step {step} of {run.steps}; the same command continues from there"
                    raise InterruptedRun(f"Stopped by {signal.Signals(stop[0]).name} {where}.", 128 + stop[0])

    def _batches(self, position: dict[str, int] | None) -> Batches:
        return self.site.batches(
            self.run.batch_size,
            seed=self.run.data_seed,
            epochs=None,
            max_norm_multiple=self.run.max_norm_multiple,
            device=self.inputs.device,  # batches are copied to a GPU while the step before computes
            state=position,
        )

    def _resample(self, active: list[_HeldGroup], step: int) -> None:
        z = self.inputs.to_resample_from(self.run, step)
        for one in active:
            for name, latents in one.group.resample(z).items():
                self.listen(Resampled(step, name, latents))

    def _log(self, active: list[_HeldGroup], step: int, clock: "_Clock") -> None:
        """Write a line for each SAE and report them, and deal with SAEs that diverged."""
        heldout = self._heldout_rows() if self._evaluates(step) else None
        found: dict[str, MetricsLine] = {}
        for one in active:
            lines, verdicts = one.group.judged_lines(heldout)
            texts = (json.dumps(line.noted(), allow_nan=False) + "\n" for line in lines)
            one.metrics.write("".join(texts).encode())
            one.metrics.flush()
            found |= {line.sae: line for line in lines}
            for verdict in verdicts:
                self.listen(Diverged(**vars(verdict)))
        metrics = tuple(found[sae.name].noted() for sae in self.run.saes if sae.name in found)
        rates = clock.rates(step, self.run.batch_size)
        self.listen(Progress(step, self.run.steps, step * self.run.batch_size, *rates, metrics))

    def _evaluates(self, step: int) -> bool:
        """Whether a line at a step measures on held-out rows: at the end, or if it is due since the line before."""
        every = self.run.eval_every
        return bool(every) and (step == self.run.steps or self.run.due(every, step))

    def _heldout_rows(self) -> Tensor | None:
        if self._heldout is None:
            self._heldout = (self.inputs.heldout(self.run.eval_rows),)
        return self._heldout[0]

    def _begin_to_save(self, writer: CheckpointWriter, active: list[_HeldGroup], step: int) -> None:
        sized = ((one, one.metrics.tell()) for one in active)
        writer.begin(step, [Unsaved(one.folder, one.metrics, one.group.checkpoint(size)) for one, size in sized])

    def _settle(self, writer: CheckpointWriter, *, wait: bool) -> None:
        """Report a checkpoint that came to disk since the last call. Raises the error of one that did not."""
        step = writer.written(wait=wait)
        if step is not None:
            merge_metrics(self.out, self.run)
            self.listen(Checkpointed(step))

    def _save_saes(self, group: Group) -> None:
        run, stopped, known = self.run, group.failed(), group.divergence
        for index, (sae, dead) in enumerate(zip(group.saes, group.dead(), strict=True)):
            healthy_at = int(known.healthy_at[index])
            if sae.name in stopped and not healthy_at:
                continue
            steps = healthy_at if sae.name in stopped else run.steps
            metadata = SAEMetadata.finite(
                version=__version__,
                name=sae.name,
                architecture=sae.kind,
                l1_coefficient=sae.l1_coefficient,
                lr=sae.lr,
                seed=sae.seed,
                init_sha256=sae.init_sha256,
                data_seed=run.data_seed,
                steps=steps,
                batch_size=run.batch_size,
                rows=steps * run.batch_size,
                site=self.site.name,
                store_digest=self.site.store.digest,
                scale=self.inputs.scale,
                max_norm_multiple=run.max_norm_multiple,
                norm_limit=self.inputs.summary.norm_limit,
                dead=None if sae.name in stopped else dead,
                dead_rows=None if sae.name in stopped else group.dead_rows,
                precision=run.precision,
                **({"stopped": stopped[sae.name]} if sae.name in stopped else {}),
                **known.history(index),
            )
            save_sae(
                self.out / "saes" / sae.name,
                group.bank.one(index),
                scale=self.inputs.scale,
                site=self.site.spec,
                plan=self.site.store.plan,
                gsae=metadata,
            )


class _Clock:
    """Rates since the last call, for display; nothing that is saved depends on them."""

    def __init__(self, batches: Batches, step: int) -> None:
        self.batches = batches
        self.then = time.perf_counter(), batches.wait_seconds, step

    def rates(self, step: int, batch_size: int) -> tuple[float, float]:
        """Rows per second, and the share of the time that was spent waiting for data."""
        now = time.perf_counter(), self.batches.wait_seconds, step
        seconds, waited, steps = (b - a for a, b in zip(self.then, now, strict=True))
        self.then = now
        return steps * batch_size / max(seconds, 1e-9), waited / max(seconds, 1e-9)
