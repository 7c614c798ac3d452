"""Checkpoints of the groups that a process trains, written by one thread.

On a GPU training goes on meanwhile: the thread writes from a snapshot in host memory. On a CPU the loop waits: the
snapshot would add more than half to the memory of a run, and a write takes less than a second a gigabyte every ten
minutes (bench/RESULTS.md). One write is under way at a time, and its error is raised in the loop that began it.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch

from .checkpoint import Checkpoint, save_checkpoint
from .snapshot import Snapshot


@dataclass(frozen=True)
class Unsaved:
    """A checkpoint to be written to a group's folder, and the metrics file that it names the size of."""

    folder: Path
    metrics: BinaryIO
    checkpoint: Checkpoint


def writes_behind(device: torch.device) -> bool:
    """Whether training on a device goes on while a checkpoint is written."""
    return device.type != "cpu"


class CheckpointWriter:
    """Writes the checkpoints of some groups. Use it in a `with`, at the end of which nothing is being written."""

    def __init__(self, device: torch.device) -> None:
        """device: where the groups are trained."""
        self._behind = writes_behind(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gsae-checkpoint")
        self._snapshots: dict[Path, Snapshot] = {}
        self._writing: tuple[int, Future[None]] | None = None

    def begin(self, step: int, unsaved: Sequence[Unsaved]) -> None:
        """Begin to write the checkpoints of a step; `written` tells when they are on disk.

        The tensors may change as soon as this returns. What `written` has not yet reported must have been waited for.
        """
        assert self._writing is None
        taken = [self._taken(one) for one in unsaved] if self._behind else [(one, Snapshot()) for one in unsaved]
        self._writing = step, self._thread.submit(_write, taken)
        if not self._behind:
            wait([self._writing[1]])

    def _taken(self, one: Unsaved) -> tuple[Unsaved, Snapshot]:
        snapshot = self._snapshots.setdefault(one.folder, Snapshot())
        tensors = snapshot.take(one.checkpoint.tensors)
        return replace(one, checkpoint=replace(one.checkpoint, tensors=tensors)), snapshot

    def written(self, *, wait: bool) -> int | None:
        """The step of checkpoints that came to disk since the last call, None if there are none. wait: for the end.

        Raises SpaceError if the disk is full, and whatever else went wrong in the thread.
        """
        if self._writing is None or not (wait or self._writing[1].done()):
            return None
        (step, written), self._writing = self._writing, None
        written.result()
        return step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._thread.shutdown(wait=True)  # the files are closed and the groups released after this


def _write(taken: Sequence[tuple[Unsaved, Snapshot]]) -> None:
    """Write checkpoints, each after the metrics that it names are on disk."""
    for one, snapshot in taken:
        os.fsync(one.metrics.fileno())
        snapshot.wait()
        save_checkpoint(one.folder, one.checkpoint)
