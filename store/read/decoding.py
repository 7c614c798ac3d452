"""Groups of chunks decoded on threads, each row straight to its place in the memory that batches are cut from.

Rows are scattered while they are decoded, so shuffling costs no pass of its own. Where rows over a norm limit are left
out, a chunk is decoded into the cache, its norms are summed there (a tenth more), and then its rows are scattered; the
gaps are closed with the group's last rows, so that a few rows are moved instead of all.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gsae.store.codec.chunks import ArraySpec
from gsae.store.codec.norm_kernels import float_bits, squared_norms
from gsae.store.codec.scatter import scatter
from gsae.store.format.row_order import Ints
from gsae.store.places.shard import IO, Shard

from .open_windows import OpenWindows
from .read_order import Group, Shuffle, mixed


class Opener(Protocol):
    """Who opens shard files: a store."""

    def shard(self, spec: ArraySpec, window: int, io: IO = "mmap") -> Shard:
        """Open the file of a window of an array."""


@dataclass(frozen=True)
class ShardFile:
    """A window of one array, as a file that can be opened."""

    store: Opener
    spec: ArraySpec
    number: int
    io: IO

    @property
    def rows(self) -> int:
        """Rows in it."""
        return self.spec.rows_of_shard(self.number)

    @property
    def chunks(self) -> int:
        """Chunks with a row in them."""
        return -(-self.rows // self.spec.chunk_rows)

    def open(self) -> Shard:
        """Open it; raises as `Shard` does."""
        return self.store.shard(self.spec, self.number, self.io)


@dataclass(frozen=True)
class Prepared:
    """A group whose files are open: its shards, one a pick, and the place of each of its rows, (rows,), in the mix.

    starts: (picks + 1,) the first row of each pick in `places`. ending: shards that no later group needs this epoch.
    """

    group: Group
    shards: list[Shard]
    starts: list[int]
    places: Ints
    ending: list[Shard]

    def pick(self, number: int) -> tuple[Shard, int, Ints]:
        """Return the shard, the chunk and the places, (rows of the chunk,), of pick `number`."""
        places = self.places[self.starts[number] : self.starts[number + 1]]
        return self.shards[number], self.group.picks[number].chunk, places


class Flight:
    """A group on its way into memory. `settle` waits until it is there; any thread may, any number of times."""

    def __init__(self, prepared: Prepared, memory: NDArray[Any], at: Ints, limit: float | None) -> None:
        """Rows go to memory (any, width); at: (rows,) where each place of the mix lies in it."""
        self.group, self.rows = prepared.group, len(at)
        self._prepared, self._memory, self._at, self._limit = prepared, memory, at, limit
        self._norms = np.empty(0 if limit is None else len(at), np.float64)
        self._work: list[Future[None]] = []
        self._lock = threading.Lock()
        self._kept: int | None = None

    def launch(self, pool: ThreadPoolExecutor, scratch: threading.local) -> list[Future[None]]:
        """Have all its chunks decoded, and return that work; scratch: where each thread keeps memory for one chunk."""
        decode = self._decode if self._limit is None else partial(self._decode_and_sum, scratch)
        self._work = [pool.submit(decode, pick) for pick in range(len(self._prepared.shards))]
        return self._work

    def _decode(self, pick: int) -> None:
        shard, chunk, places = self._prepared.pick(pick)
        shard.decode_into(chunk, self._memory, self._at[places])

    def _decode_and_sum(self, scratch: threading.local, pick: int) -> None:
        shard, chunk, places = self._prepared.pick(pick)
        if not hasattr(scratch, "rows") or len(scratch.rows) != len(places):
            scratch.rows = np.empty((len(places), self._memory.shape[1]), self._memory.dtype)
        shard.decode_into(chunk, scratch.rows, np.arange(len(places)))
        norms = np.empty(len(places), np.float64)
        squared_norms(float_bits(scratch.rows, shard.spec.dtype), norms)
        self._norms[places] = norms
        scatter(scratch.rows, self._memory, self._at[places])

    def settle(self) -> int:
        """Wait for its rows and return how many were kept; these are in the first places of the mix."""
        with self._lock:
            if self._kept is None:
                for future in self._work:
                    future.result()
                self._kept = self._close_gaps()
            return self._kept

    def _close_gaps(self) -> int:
        """Move the last kept rows to the places of those that are left out; return how many are kept."""
        if self._limit is None:
            return self.rows
        keep = self._norms < self._limit
        kept = int(keep.sum())
        gaps, last = np.flatnonzero(~keep[:kept]), kept + np.flatnonzero(keep[kept:])
        self._memory[self._at[gaps]] = self._memory[self._at[last]]
        return kept


class Decoder:
    """Opens the files of groups and decodes them on `threads` threads; keeps the files of open windows open."""

    def __init__(
        self, files: Sequence[ShardFile], shuffle: Shuffle, squared_norm_limit: float | None, threads: int
    ) -> None:
        """Read `files`, one a window. squared_norm_limit: rows of that ||x||^2 or more, and those with a NaN, are left
        out; None keeps all unseen."""
        self.limit = squared_norm_limit
        self._shuffle = shuffle
        self._windows = OpenWindows(files, shuffle)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gsae-decode")
        self._scratch = threading.local()
        self._decoding: list[Future[None]] = []

    def prepare(self, group: Group) -> Prepared:
        """Open a group's files, have the kernel fetch its chunks, and find its order; raises as `Shard` does."""
        opened = self._windows.enter(group)
        shards = [opened[pick.window] for pick in group.picks]
        for shard, pick in zip(shards, group.picks, strict=True):
            shard.will_need(pick.chunk)
        ending = [self._windows.leave(pick.window) for pick in group.picks if pick.last]
        counts = [shard.chunk_rows(pick.chunk) for shard, pick in zip(shards, group.picks, strict=True)]
        starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        return Prepared(group, shards, starts, mixed(starts[-1], self._shuffle, group), ending)

    def launch(self, prepared: Prepared, memory: NDArray[Any], at: Ints) -> Flight:
        """Start to decode a group into rows at (rows,) of memory (any, width)."""
        flight = Flight(prepared, memory, at, self.limit)
        begun = flight.launch(self._pool, self._scratch)
        self._decoding = [*(work for work in self._decoding if not work.done()), *begun]
        if prepared.ending:
            self._pool.submit(_close_after, self._decoding, prepared.ending)
        return flight

    def close(self, cancel: bool) -> None:
        """Stop the threads, after the chunks that they are at (cancel) or all that were asked for; close the files."""
        self._pool.shutdown(wait=True, cancel_futures=cancel)
        self._windows.close()


def _close_after(decoding: Sequence[Future[None]], ending: Sequence[Shard]) -> None:
    """Close files that ended, on a decoding thread: unmapping takes milliseconds, which nobody else should wait for.

    decoding: all that was begun before, of earlier groups too: a slow thread may still be at a chunk of one.
    """
    wait(decoding)
    for shard in ending:
        shard.close()
