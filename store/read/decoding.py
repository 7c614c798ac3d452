"""Mixes decoded on threads, each row straight to its place in the memory that batches are cut from.

Rows are scattered while they are decoded, so permuting them costs no pass over memory. If rows over a norm limit are
left out, a chunk is decoded into the cache, its norms are computed there (a tenth more time), and its rows are then
scattered; the gaps are filled with the last rows of the mix, so that few rows are moved.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.store.codec.norm_kernels import float_bits, squared_norms
from gsae.store.codec.scatter import scatter
from gsae.store.format.row_order import Ints
from gsae.store.places.shard import ShardReader

from .open_windows import OpenWindows
from .read_order import Mix, mixed
from .reading import Reading


@dataclass(frozen=True)
class OpenedMix:
    """A mix with its files open.

    shards: one for each pick. starts: (picks + 1,) the first row of each pick in `places`. places: (rows,) the place
    in the mix of each row in the order of the picks. ending: shards that no later mix needs in this epoch.
    """

    mix: Mix
    shards: list[ShardReader]
    starts: list[int]
    places: Ints
    ending: list[ShardReader]

    def pick(self, number: int) -> tuple[ShardReader, int, Ints]:
        """Return the shard, the chunk and the places (rows of the chunk,) of pick `number`."""
        places = self.places[self.starts[number] : self.starts[number + 1]]
        return self.shards[number], self.mix.picks[number].chunk, places


class MixDecoding:
    """The decoding of a mix into memory. `settle` waits for its end; any thread may call it, any number of times."""

    def __init__(self, opened: OpenedMix, memory: NDArray[Any], at: Ints, limit: float | None) -> None:
        """Decode into memory (any, width); at: (rows,) the row of memory for each place of the mix.

        limit: rows with ||x||^2 at or over it are left out; None keeps all.
        """
        self.mix, self.rows = opened.mix, len(at)
        self._opened, self._memory, self._at, self._limit = opened, memory, at, limit
        self._norms = np.empty(0 if limit is None else len(at), np.float64)
        self._work: list[Future[None]] = []
        self._lock = threading.Lock()
        self._kept: int | None = None

    def start(self, pool: ThreadPoolExecutor, scratch: threading.local) -> list[Future[None]]:
        """Submit the decoding of each chunk; scratch: where each thread keeps memory for one chunk."""
        decode = self._decode if self._limit is None else partial(self._decode_and_sum, scratch)
        self._work = [pool.submit(decode, pick) for pick in range(len(self._opened.shards))]
        return self._work

    def _decode(self, pick: int) -> None:
        shard, chunk, places = self._opened.pick(pick)
        shard.decode_into(chunk, self._memory, self._at[places])

    def _decode_and_sum(self, scratch: threading.local, pick: int) -> None:
        shard, chunk, places = self._opened.pick(pick)
        if not hasattr(scratch, "rows") or len(scratch.rows) != len(places):
            scratch.rows = np.empty((len(places), self._memory.shape[1]), self._memory.dtype)
        shard.decode_into(chunk, scratch.rows, np.arange(len(places)))
        norms = np.empty(len(places), np.float64)
        squared_norms(float_bits(scratch.rows, shard.spec.dtype), norms)
        self._norms[places] = norms
        scatter(scratch.rows, self._memory, self._at[places])

    def settle(self) -> int:
        """Wait for all rows; return how many are kept: those in the first places of the mix. Raises CorruptError."""
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
    """Opens the files of mixes and decodes them on threads; files of the windows in use stay open."""

    def __init__(self, reading: Reading) -> None:
        """Decode the files of `reading`, as its options say."""
        self.limit = reading.squared_norm_limit
        self._shuffle = reading.options.shuffle
        self._windows = OpenWindows(reading.files, self._shuffle)
        self._pool = ThreadPoolExecutor(reading.threads, thread_name_prefix="gsae-decode")
        self._scratch = threading.local()
        self._decoding: list[Future[None]] = []

    def open(self, mix: Mix) -> OpenedMix:
        """Open the files of a mix, have its chunks fetched, and compute its order. Raises as `ShardFile.open`."""
        opened = self._windows.enter(mix)
        shards = [opened[pick.window] for pick in mix.picks]
        for shard, pick in zip(shards, mix.picks, strict=True):
            shard.will_need(pick.chunk)
        ending = [self._windows.leave(pick.window) for pick in mix.picks if pick.last]
        counts = [shard.rows_of_chunk(pick.chunk) for shard, pick in zip(shards, mix.picks, strict=True)]
        starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        return OpenedMix(mix, shards, starts, mixed(starts[-1], self._shuffle, mix), ending)

    def start(self, opened: OpenedMix, memory: NDArray[Any], at: Ints) -> MixDecoding:
        """Start to decode a mix into rows at (rows,) of memory (any, width)."""
        decoding = MixDecoding(opened, memory, at, self.limit)
        begun = decoding.start(self._pool, self._scratch)
        self._decoding = [*(work for work in self._decoding if not work.done()), *begun]
        if opened.ending:
            self._pool.submit(_close_after, self._decoding, opened.ending)
        return decoding

    def close(self, cancel: bool) -> None:
        """Stop the threads and close the files; cancel: chunks that no thread has begun are not decoded."""
        self._pool.shutdown(wait=True, cancel_futures=cancel)
        self._windows.close()


def _close_after(decoding: Sequence[Future[None]], ending: Sequence[ShardReader]) -> None:
    """Close files that are not needed any more. It runs on a decoding thread, because unmapping takes milliseconds.

    decoding: all work that was begun before, of earlier mixes too: a slow thread may still decode a chunk of one.
    """
    wait(decoding)
    for shard in ending:
        shard.close()
