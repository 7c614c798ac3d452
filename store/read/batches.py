"""Shuffled batches of a site, without end or for some epochs, from any position.

A thread decodes mixes ahead of the consumer, one more than is being cut; a batch is a slot of memory that its rows
were decoded into, handed out without a copy. The order is a pure function of (seed, epoch), so a stream that is
stopped at any batch continues with the same batches. Each row is seen once an epoch. Memory: two mixes and three
batches, whatever the size of the store; files are mapped, and mapped pages belong to the kernel's cache.
"""

import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from gsae.errors import UsageError

from .read_ahead import PlacedMix, ReadAhead
from .read_order import POSITION, Position, check_position
from .reading import Reading


@dataclass(frozen=True)
class Cut:
    """A batch: the first `rows` rows of a slot, and the position after it."""

    slot: int
    rows: int
    after: Position


class Cutter:
    """Cuts mixes into batches, from a position on."""

    def __init__(self, batch_rows: int, position: Position) -> None:
        """Begin after `position`.

        done: rows of the next mix that were handed out before. counted: whether `skipped` includes the next mix. Both
        differ from 0 and False for the first mix only. rest: the rows after the last full batch.
        """
        self._batch_rows = batch_rows
        self._position = position
        self.done, self.skipped = position["offset"], position["skipped"]
        self.counted = any(position.values())
        self.rest: Cut | None = None

    def cut(self, placed: PlacedMix) -> tuple[list[Cut], list[int]]:
        """Wait for a mix; return the batches that it fills, and its slots that are in none."""
        mix, kept = placed.decoding.mix, placed.decoding.settle()
        if kept < self.done:
            raise UsageError(f"{self._position} is no position of these batches: mix {mix.number} has {kept} rows.")
        self.skipped += 0 if self.counted else placed.decoding.rows - kept
        here = {"epoch": mix.epoch, "group": mix.number, "skipped": self.skipped}
        full = placed.full_slots(kept, self._batch_rows)
        rows, unfilled = placed.unfilled(kept, self._batch_rows)
        cuts, unused = [], placed.slots[full + len(unfilled) :]
        for number, slot in enumerate(placed.slots[:full], 1):
            end = number * self._batch_rows - placed.start
            if end > self.done:
                cuts.append(Cut(slot, self._batch_rows, here | {"offset": end}))
            else:
                unused.append(slot)
        self.rest = Cut(unfilled[0], rows, here | {"offset": kept}) if unfilled else None
        self.done, self.counted = 0, False
        return cuts, unused


class Batches(IterableDataset[Tensor]):
    """Batches (batch_size, d_in) in the store's dtype, on the CPU; the module's docstring describes their order.

    An iterator over one pass, and a dataset for `DataLoader(batches, batch_size=None)` with at most one worker. It
    pickles as what is still to come. The last batch is shorter if the rows of all epochs are no multiple of
    batch_size. Up to two batches may be held without a copy; more are copied. `skipped` counts the rows left out for
    their norm, `wait_seconds` the time spent waiting for rows. Close it, or use it in a `with`.
    """

    def __init__(self, reading: Reading, position: Position | None = None) -> None:
        """Read from `position` on; reading starts with the first batch that is taken. Raises UsageError."""
        check_position(position)
        self._reading = reading
        self._position = dict.fromkeys(POSITION, 0) | (position or {})
        self._process: int | None = None  # where the threads of `_ahead` run
        self._closed = False
        self.wait_seconds = 0.0

    @property
    def skipped(self) -> int:
        """Rows left out so far, counted from the beginning of the stream."""
        return self._position["skipped"]

    @property
    def memory(self) -> int:
        """Bytes that reading takes, without the maps of files."""
        return self._reading.memory

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last batch taken."""
        return dict(self._position)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        rows, self._position = self._take()
        return rows

    def _take(self) -> tuple[Tensor, Position]:
        """Return the next batch and the position after it. Raises StopIteration at the end."""
        if self._closed:
            raise StopIteration
        if self._process != os.getpid():  # a forked process has none of the threads, so it starts its own
            self._begin()
        started = time.perf_counter()
        try:
            cut = next(self._cuts)
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - started
        return self._ahead.slots.lend(cut.slot, cut.rows), cut.after

    def _begin(self) -> None:
        info = get_worker_info()
        if info is not None and info.num_workers > 1:
            raise UsageError(
                f"{info.num_workers} workers would each read every row. Use num_workers 0 or 1; rows are decoded on "
                "threads anyway."
            )
        self._ahead = ReadAhead(self._reading, self._position)
        self._cuts = _cuts(self._ahead, Cutter(self._reading.batch_rows, self._position))
        self._process = os.getpid()
        weakref.finalize(self, self._ahead.stop).atexit = False

    def close(self) -> None:
        """Stop the threads and close the files. Batches that were taken stay valid."""
        self._closed = True
        if self._process == os.getpid():
            self._ahead.stop()
            self._ahead.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._reading, self._position)


def _cuts(ahead: ReadAhead, cutter: Cutter) -> Iterator[Cut]:
    """Yield the batches to come; slots that are in no batch are given back."""
    for placed in ahead:
        cuts, unused = cutter.cut(placed)
        for slot in unused:
            ahead.slots.give_back(slot)
        yield from cuts
    if cutter.rest is not None:
        yield cutter.rest
