"""Making windows: contexts are run in the plan's batches, every row goes to its place, the whole is written.

A window is made alone, from plan and tokens, so it does not matter who makes which, or when. Three things go on side
by side: passes, moving rows into a window's buffer (`moving.py`), and encoding and publishing the window before. The
third window begins when the first is written, so memory is the model, two windows a site and a few batches.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsae.store import (
    DTYPE_BYTES,
    Plan,
    Split,
    all_windows,
    context_batches,
    empty_rows,
    inverse,
    row_mask,
    stored_order,
    unfinished,
    unsigned,
    write_window,
)

from .batch_size import run_twice
from .events import Running
from .model.capture import LanguageModel, capture
from .request import Rows
from .row_mover import Mover, copier_for
from .workers import Worker

Buffers = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """Contexts (contexts,) by number that are run together; rows `picks` of them, laid flat, go to `places` (rows,)."""

    contexts: NDArray[np.int64]
    picks: NDArray[np.int64]
    places: NDArray[np.int64]


@dataclass(frozen=True)
class LaidWindow:
    """What makes a window: its batches in order, and the source of each of its rows, (rows,)."""

    split: Split
    number: int
    batches: tuple[Batch, ...]
    source: NDArray[np.int64]


def due_windows(plan: Plan, out: Path, own: Worker) -> list[tuple[Split, int]]:
    """Return the windows of a worker that have no record, in the order of work."""
    numbers = {window: number for number, window in enumerate(all_windows(plan))}
    return [window for window in unfinished(out, plan) if own.takes(numbers[window])]


def lay(plan: Plan, rows: Rows, tokens: NDArray[np.int32], split: Split, number: int) -> LaidWindow:
    """Lay out window `number` of a split; tokens: (contexts, context_size), all of them."""
    window = rows.of(split).window(number)
    mask = row_mask(tokens[window.contexts], plan.tokenizer.excluded_ids, plan.dropped_positions)
    stored = stored_order(window, split, plan.seed)
    places = inverse(stored)
    batches = []
    before = -window.skip  # laid rows of the window before this batch; the first context may have begun in another
    for batch in context_batches(len(window.contexts), plan.batch_size):
        picks = np.flatnonzero(mask[batch])
        first, last = max(-before, 0), min(len(picks), window.rows - before)
        batches.append(Batch(window.contexts[batch], picks[first:last], places[before + first : before + last]))
        before += len(picks)
    return LaidWindow(split, number, tuple(batches), window.sources(mask)[stored])


def make_windows(
    plan: Plan,
    windows: list[tuple[Split, int]],
    rows: Rows,
    tokens: NDArray[np.int32],
    lm: LanguageModel,
    out: Path,
    listen: Callable[[Running], None],
) -> None:
    """Make and publish `windows`; raises what `capture` and `write_window` raise, and SpaceError."""
    sizes = [rows.of(split).window(number).rows for split, number in windows]
    buffers = [_buffers(plan, max(sizes)) for _ in windows[:2]]
    meter = _Meter(plan, sum(sizes))
    writes: list[Future[int]] = []
    with Mover(copier_for(lm.device)) as mover, ThreadPoolExecutor(1, thread_name_prefix="gsae-write") as background:
        coming = mover.run_between(partial(lay, plan, rows, tokens, *windows[0]))
        for place, _ in enumerate(windows):
            laid = coming.result()
            if place + 1 < len(windows):
                coming = mover.run_between(partial(lay, plan, rows, tokens, *windows[place + 1]))
            if place >= 2:
                meter.wrote(sizes[place - 2], writes[place - 2].result())
            into = {name: buffer[: sizes[place]] for name, buffer in buffers[place % 2].items()}
            moves = []
            for batch in laid.batches:
                began = mover.mark()
                picked = _pass(plan, lm, tokens, batch, mover)
                moves.append(mover.put(picked, into, batch.places, began))
                listen(meter.ran(batch, mover.busy_seconds))
            writes.append(background.submit(_write, out, plan, laid, into, moves))
        for place in range(max(len(windows) - 2, 0), len(windows)):
            meter.wrote(sizes[place], writes[place].result())
    listen(meter.event(mover.busy_seconds))


class _Meter:
    """Counts what is done."""

    def __init__(self, plan: Plan, total: int) -> None:
        self._context_size, self._total = plan.context_size, total
        self._row_bytes = sum(site.d_in for site in plan.sites) * DTYPE_BYTES[plan.model.dtype]
        self._began = time.perf_counter()
        self._rows = self._tokens = self._written = self._raw = 0

    def ran(self, batch: Batch, busy: float) -> Running:
        self._rows += len(batch.picks)
        self._tokens += len(batch.contexts) * self._context_size
        return self.event(busy)

    def wrote(self, rows: int, size: int) -> None:
        self._written += size
        self._raw += rows * self._row_bytes

    def event(self, busy: float) -> Running:
        seconds = time.perf_counter() - self._began
        return Running(self._rows, self._total, self._tokens, seconds, self._written, self._raw, busy)


def _buffers(plan: Plan, rows: int) -> Buffers:
    """Return room for a window: for each site (rows, d_in) bit patterns."""
    kind = unsigned(plan.model.dtype)
    return {site.name: empty_rows(rows, site.d_in, kind) for site in plan.sites}


def _pass(plan: Plan, lm: LanguageModel, tokens: NDArray[np.int32], batch: Batch, mover: Mover) -> dict[str, Tensor]:
    """Run a batch; return each site's rows (rows, d_in) on the device where they arise."""
    ids = _pinned(lm.device, tokens[batch.contexts].astype(np.int64))
    picks = _pinned(lm.device, batch.picks)

    def pick(value: Tensor) -> Tensor:
        return value.flatten(0, 1).index_select(0, picks.to(value.device, non_blocking=True))

    return run_twice(lambda: capture(lm, plan.sites, ids, pick), mover.drain, len(batch.contexts))


def _pinned(device: torch.device, values: NDArray[np.int64]) -> Tensor:
    """Return a tensor that is copied to a GPU without waiting for what the GPU is at."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _write(out: Path, plan: Plan, laid: LaidWindow, rows: Buffers, moves: list[Future[None]]) -> int:
    """Publish a window when all its rows are in their places; return the bytes of its files."""
    for move in moves:
        move.result()
    record = write_window(out, plan, laid.split, laid.number, rows, laid.source)
    return sum(entry.file.size for entry in record.arrays)
