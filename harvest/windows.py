"""Making windows: contexts run in the plan's batches, each row is put at its index, and the whole is published.

A window follows from the plan and the tokens alone, so any worker may make it at any time. Four things run at once:
the passes, moving rows into the buffer of a window (`row_mover.py`), encoding the window before it, and publishing
earlier ones (`window_buffers.py`). Memory is the model, two windows for each site and a few batches.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsae.errors import UsageError
from gsae.store import (
    DTYPE_BYTES,
    EncodedWindow,
    Moments,
    Plan,
    Record,
    Split,
    WindowTotals,
    all_windows,
    context_batches,
    encode_window,
    inverse,
    row_mask,
    stored_order,
    unfinished,
)

from .batch_size import run_twice
from .events import BatchDone
from .model.capture import LanguageModel, capture
from .nonfinite import NonfiniteRows
from .row_layouts import RowLayouts
from .row_mover import Mover, copier_for
from .window_buffers import SiteRows, WindowBuffers
from .workers import Worker

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """Contexts that run together, and where their rows go.

    contexts: (contexts,) numbers in the store. picks: (rows,) which of the batch's activations, flattened to
    (contexts * context_size, d_in), are rows of the window. targets: (rows,) the index of each in the window.
    """

    contexts: NDArray[np.int64]
    picks: NDArray[np.int64]
    targets: NDArray[np.int64]


@dataclass(frozen=True)
class WindowTask:
    """The work that makes a window: its batches in order, and the source of each of its rows, (rows,)."""

    split: Split
    number: int
    batches: tuple[Batch, ...]
    source: NDArray[np.int64]


def due_windows(plan: Plan, out: Path, worker: Worker) -> list[tuple[Split, int]]:
    """Return the windows of a worker that have no record yet, in the order of work."""
    numbers = {window: number for number, window in enumerate(all_windows(plan))}
    return [window for window in unfinished(out, plan) if worker.makes(numbers[window])]


def window_task(plan: Plan, layouts: RowLayouts, tokens: Tokens, split: Split, number: int) -> WindowTask:
    """Return the work that makes window `number` of a split; tokens: all of the store, (contexts, context_size)."""
    window = layouts.of(split).window(number)
    mask = row_mask(tokens[window.contexts], plan.tokenizer.excluded_ids, plan.dropped_positions)
    stored = stored_order(window, split, plan.seed)
    targets = inverse(stored)
    batches = []
    before = -window.skip  # rows of the window before this batch; the first context may begin in another window
    for part in context_batches(len(window.contexts), plan.batch_size):
        picks = np.flatnonzero(mask[part])
        first, last = max(-before, 0), min(len(picks), window.rows - before)
        batches.append(Batch(window.contexts[part], picks[first:last], targets[before + first : before + last]))
        before += len(picks)
    return WindowTask(split, number, tuple(batches), window.sources(mask)[stored])


def make_windows(
    plan: Plan,
    windows: list[tuple[Split, int]],
    layouts: RowLayouts,
    tokens: Tokens,
    lm: LanguageModel,
    out: Path,
    listen: Callable[[BatchDone], None],
    nonfinite: NonfiniteRows,
) -> WindowTotals:
    """Make and publish `windows`; return the totals of those that are the plan's first ones.

    Raises the errors of `capture`, `encode_window` and `nonfinite.check`.
    """
    sizes = [layouts.of(split).window(number).rows for split, number in windows]
    meter = _Meter(plan, sum(sizes))
    task_of = partial(window_task, plan, layouts, tokens)

    def count(record: Record) -> None:
        meter.count_window(record)
        nonfinite.count(record)

    totals = WindowTotals(plan)
    copier = copier_for(lm.device, plan.batch_size * plan.context_size)
    with Mover(copier) as mover, WindowBuffers(plan, max(sizes), count, totals) as buffers:
        coming = mover.run_between(partial(task_of, *windows[0]))
        for following in [*windows[1:], None]:
            task = coming.result()
            if following is not None:
                coming = mover.run_between(partial(task_of, *following))
            rows = buffers.take(len(task.source))
            moves = []
            for batch in task.batches:
                buffers.collect()
                began, picked = _run_batch(plan, lm, tokens, batch, mover)
                moves.append(mover.put(picked, rows, batch.targets, began))
                listen(meter.count_batch(batch, mover.busy_seconds))
            buffers.write(partial(_encode, out, plan, task, rows, moves, nonfinite.check))
        buffers.finish()
    listen(meter.event(mover.busy_seconds))
    return totals


class _Meter:
    """Counts rows, tokens and bytes for the events."""

    def __init__(self, plan: Plan, total: int) -> None:
        self._context_size, self._total = plan.context_size, total
        self._row_bytes = sum(site.d_in for site in plan.sites) * DTYPE_BYTES[plan.model.dtype]
        self._began = time.perf_counter()
        self._rows = self._tokens = self._written = self._raw = 0

    def count_batch(self, batch: Batch, busy: float) -> BatchDone:
        self._rows += len(batch.picks)
        self._tokens += len(batch.contexts) * self._context_size
        return self.event(busy)

    def count_window(self, record: Record) -> None:
        self._written += sum(entry.file.size for entry in record.arrays)
        self._raw += record.arrays[0].rows * self._row_bytes

    def event(self, busy: float) -> BatchDone:
        seconds = time.perf_counter() - self._began
        return BatchDone(self._rows, self._total, self._tokens, seconds, self._written, self._raw, busy)


def _run_batch(
    plan: Plan, lm: LanguageModel, tokens: Tokens, batch: Batch, mover: Mover
) -> tuple[Any, dict[str, Tensor]]:
    """Run a batch; return the mark before its pass, and each site's rows (rows, d_in), on the device of the site."""
    ids = mover.stage("token ids", tokens[batch.contexts].astype(np.int64))
    picks = mover.stage("picks", batch.picks)
    picks_on: dict[torch.device, Tensor] = {}
    dtype = getattr(torch, plan.model.dtype)

    def pick(value: Tensor) -> Tensor:
        if value.dtype != dtype:  # its bits would be stored as those of the plan's dtype
            raise UsageError(f"A site gives {value.dtype}, and the store is of {dtype}. Use another --dtype.")
        if value.device not in picks_on:
            picks_on[value.device] = picks.to(value.device, non_blocking=value.is_cuda)
        return value.flatten(0, 1).index_select(0, picks_on[value.device])

    return run_twice(lambda: (mover.mark(), capture(lm, plan.sites, ids, pick)), mover.drain, len(batch.contexts))


def _encode(
    out: Path,
    plan: Plan,
    task: WindowTask,
    rows: Callable[[], SiteRows],
    moves: list[Future[None]],
    check: Callable[[Split, int, Mapping[str, Moments]], None],
) -> EncodedWindow:
    """Encode a window once all its rows are in the buffer, and check its moments."""
    for move in moves:
        move.result()
    approve = partial(check, task.split, task.number)
    return encode_window(out, plan, task.split, task.number, rows(), task.source, approve=approve)
