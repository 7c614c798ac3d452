"""Shuffled batches of a site, without end or for some epochs, from any position.

Windows come in seeded order, `open_windows` at a time; the next chunk is a seeded draw among them; groups of `mix`
chunks are decoded together by background threads straight to their places in a permuted buffer, and batches are cut
from it. Order is a pure function of (seed, epoch), so a position is four integers and stopping anywhere changes
nothing. A row is seen once an epoch. Memory: two groups and a batch, whatever the store's size.
"""

import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import kernels
from .chunks import NUMPY_DTYPES, ArraySpec, widen
from .errors import UsageError
from .mapped import IO, UNSIGNED, Shard
from .order import Stream, permutation, words

POSITION = ("epoch", "group", "offset", "skipped")
NORM_ROWS = 4096


@dataclass(frozen=True)
class Shuffle:
    """What the order of rows depends on, beside the store."""

    seed: int
    mix: int
    open_windows: int


@dataclass(frozen=True)
class Pick:
    """A chunk to read; `last` when no other chunk of its window follows in the epoch."""

    window: int
    chunk: int
    last: bool


def schedule(chunks: list[int], shuffle: Shuffle, epoch: int) -> Iterator[Pick]:
    """Yield every chunk of an epoch in the order in which they are read; chunks: how many each window has."""
    order = permutation(len(chunks), shuffle.seed, Stream.READ_WINDOWS, epoch=epoch)
    closed = iter(order.tolist())

    def inside(window: int) -> tuple[int, list[int]]:
        left = permutation(chunks[window], shuffle.seed, Stream.READ_CHUNKS, window, epoch)
        return window, left.tolist()

    slots = [inside(window) for window in itertools.islice(closed, shuffle.open_windows)]
    for draw in words(sum(chunks), shuffle.seed, Stream.READ_DRAWS, epoch=epoch).tolist():
        at = draw % len(slots)
        window, left = slots[at]
        yield Pick(window, left.pop(), last=not left)
        if not left:
            following = next(closed, None)
            slots[at] = inside(following) if following is not None else slots[-1]
            if following is None:
                slots.pop()


@dataclass(frozen=True)
class Group:
    """Chunks that are decoded and mixed together."""

    epoch: int
    number: int
    picks: tuple[Pick, ...]


def groups(chunks: list[int], shuffle: Shuffle, epochs: int | None, first: tuple[int, int]) -> Iterator[Group]:
    """Yield the groups from (epoch, group) `first` on; epochs: None for no end."""
    for epoch in itertools.count(first[0]) if epochs is None else range(first[0], epochs):
        picks = schedule(chunks, shuffle, epoch)
        for number in itertools.count():
            picked = tuple(itertools.islice(picks, shuffle.mix))
            if not picked:
                break
            if (epoch, number) >= first:
                yield Group(epoch, number, picked)


class GroupReader:
    """Decodes groups, one after the other, on `threads` threads; keeps the files of open windows open."""

    def __init__(
        self,
        root: Path,
        spec: ArraySpec,
        sizes: list[int],
        shuffle: Shuffle,
        squared_norm_limit: float | None,
        threads: int,
        io: IO,
    ) -> None:
        """Read the array `spec` under `root`; sizes: the bytes of each shard file.

        squared_norm_limit: rows of that ||x||^2 or more, and those with a NaN, are left out; None keeps all unseen.
        """
        self.root, self.spec, self.sizes, self.io = root, spec, sizes, io
        self.shuffle = shuffle
        self.limit = squared_norm_limit
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gsae-decode")
        self._open: dict[int, Shard] = {}

    def read(self, group: Group) -> tuple[NDArray[Any], int]:
        """Return the rows (rows, d_in) of a group in their mixed order, as bit patterns, and how many were left out."""
        shards = [self._shard(pick.window) for pick in group.picks]
        counts = [shard.chunk_rows(pick.chunk) for shard, pick in zip(shards, group.picks, strict=True)]
        for shard, pick in zip(shards, group.picks, strict=True):
            shard.will_need(pick.chunk)
        places = permutation(sum(counts), self.shuffle.seed, Stream.READ_MIX, group.number, group.epoch)
        out = np.empty((len(places), self.spec.width), UNSIGNED[NUMPY_DTYPES[self.spec.dtype].itemsize])
        parts = np.split(places, np.cumsum(counts)[:-1])
        work = [
            self._pool.submit(shard.decode_into, pick.chunk, out, part)
            for shard, pick, part in zip(shards, group.picks, parts, strict=True)
        ]
        for future in work:
            future.result()
        for pick in group.picks:
            if pick.last:
                self._open.pop(pick.window).close()
        return self._kept(out)

    def _kept(self, rows: NDArray[Any]) -> tuple[NDArray[Any], int]:
        if self.limit is None:
            return rows, 0
        norms = np.empty(len(rows), np.float64)

        def fill(first: int) -> None:
            part = slice(first, first + NORM_ROWS)
            kernels.squared_norms(widen(rows[part], self.spec.dtype), norms[part])

        list(self._pool.map(fill, range(0, len(rows), NORM_ROWS)))
        keep = norms < self.limit
        kept = int(keep.sum())
        return (rows, 0) if kept == len(rows) else (rows[keep], len(rows) - kept)

    def _shard(self, window: int) -> Shard:
        if window not in self._open:
            self._open[window] = Shard(self.root, self.spec, window, self.sizes[window], self.io)
        return self._open[window]

    def close(self) -> None:
        """Stop the threads and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for shard in self._open.values():
            shard.close()
        self._open.clear()


class Batches(Iterator[Tensor]):
    """Batches (batch_size, d_in) in the store's dtype, on the CPU; see the module's text for their order.

    The last one is shorter when the rows of all epochs are no multiple of batch_size. `skipped` counts the rows left
    out for their norm, `wait_seconds` the time spent waiting for rows. Close it, or use it in a `with`.
    """

    def __init__(
        self, reader: GroupReader, coming: Iterator[Group], batch_size: int, state: dict[str, int] | None
    ) -> None:
        """Cut batches from the groups in `coming`, which begin with the one that `state` is in."""
        self._reader = reader
        self._coming = coming
        self._batch_size = batch_size
        self._position = dict.fromkeys(POSITION, 0) | (state or {})
        self._rows: NDArray[Any] = np.empty((0, reader.spec.width), np.uint8)
        self._offset = 0
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="gsae-read")
        self._next: tuple[Group, Future[tuple[NDArray[Any], int]]] | None = None
        self.wait_seconds = 0.0
        self._ask()
        if self._position["offset"]:
            counted, offset = self.skipped, self._position["offset"]
            self._advance()
            self._offset, self._position["skipped"] = offset, counted

    @property
    def skipped(self) -> int:
        """Rows left out so far, since the very beginning."""
        return self._position["skipped"]

    def __next__(self) -> Tensor:
        parts: list[NDArray[Any]] = []
        needed = self._batch_size
        while needed and (self._offset < len(self._rows) or self._advance()):
            part = self._rows[self._offset : self._offset + needed]
            self._offset += len(part)
            needed -= len(part)
            parts.append(part)
        if not parts:
            self.close()
            raise StopIteration
        self._position["offset"] = self._offset
        return as_tensor(parts[0] if len(parts) == 1 else np.concatenate(parts), self._reader.spec.dtype)

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last batch handed out."""
        return dict(self._position)

    def close(self) -> None:
        """Stop the threads and close the files."""
        self._next = None
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self) -> None:
        """Start reading the next group."""
        group = next(self._coming, None)
        self._next = None if group is None else (group, self._ahead.submit(self._reader.read, group))

    def _advance(self) -> bool:
        """Make the next group that has rows current; False at the end."""
        while self._next is not None:
            group, future = self._next
            started = time.perf_counter()
            self._rows, left_out = future.result()
            self.wait_seconds += time.perf_counter() - started
            self._ask()
            self._offset = 0
            skipped = self.skipped + left_out
            self._position = {"epoch": group.epoch, "group": group.number, "offset": 0, "skipped": skipped}
            if len(self._rows):
                return True
        return False


def check_position(state: dict[str, int] | None) -> tuple[int, int]:
    """Return (epoch, group) of a position, (0, 0) for None; raises UsageError when it is none."""
    if state is None:
        return 0, 0
    if set(state) != set(POSITION) or min(state.values()) < 0:
        raise UsageError(f"A position has {', '.join(POSITION)}, each 0 or more; got {state}.")
    return state["epoch"], state["group"]


def default_threads() -> int:
    """Threads that decode when nobody says how many."""
    return min(4, os.cpu_count() or 1)


def as_tensor(rows: NDArray[Any], dtype: str) -> Tensor:
    """Return rows of bit patterns as a tensor of `dtype`, without a copy."""
    signed = {2: np.int16, 4: np.int32, 8: np.int64}[rows.dtype.itemsize]
    kind: torch.dtype = getattr(torch, dtype)
    return torch.from_numpy(rows.view(signed)).view(kind)
