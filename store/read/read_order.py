"""In which order rows are read: windows, chunks, mixes and the rows of a mix, as pure functions of a seed.

Windows come in seeded order, `open_windows` at a time; the next chunk is a seeded draw among them; the chunks of an
epoch are cut into equal mixes of at most `mix_chunks`, and the rows of a mix are permuted together. So a position in
a stream is four integers, and no other state is kept. The random words are Philox's and all arithmetic is on integers,
so the order never changes with a library. It costs 0.2 ms for a mix of 65,536 rows.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsae.errors import UsageError
from gsae.store.codec.numba_support import compiled
from gsae.store.format.row_order import Ints, Stream, permutation, words

Position = dict[str, int]
# The fields of a position: epoch, number of the mix, rows of it handed out, rows left out since the beginning.
POSITION = ("epoch", "group", "offset", "skipped")


@dataclass(frozen=True)
class Shuffle:
    """What the order of rows depends on, besides the store."""

    seed: int
    mix_chunks: int
    open_windows: int


@dataclass(frozen=True)
class Pick:
    """A chunk to read. window: the index of its file. last: no other chunk of this window follows in the epoch."""

    window: int
    chunk: int
    last: bool


def window_order(windows: int, shuffle: Shuffle, epoch: int) -> list[int]:
    """Return the windows in the order in which an epoch opens them."""
    order: list[int] = permutation(windows, shuffle.seed, Stream.READ_WINDOWS, epoch=epoch).tolist()
    return order


def schedule(chunks: Sequence[int], shuffle: Shuffle, epoch: int) -> Iterator[Pick]:
    """Yield every chunk of an epoch in the order in which they are read; chunks: the number in each window."""
    closed = iter(window_order(len(chunks), shuffle, epoch))

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
class Mix:
    """Mix `number` of an epoch: the chunks that are decoded and permuted together."""

    epoch: int
    number: int
    picks: tuple[Pick, ...]


def mixes(chunks: Sequence[int], shuffle: Shuffle, epochs: int | None, first: tuple[int, int]) -> Iterator[Mix]:
    """Yield the mixes from (epoch, number) `first` on; epochs: None for no end."""
    sizes = mix_sizes(sum(chunks), shuffle.mix_chunks)
    for epoch in itertools.count(first[0]) if epochs is None else range(first[0], epochs):
        picks = schedule(chunks, shuffle, epoch)
        for number, size in enumerate(sizes):
            picked = tuple(itertools.islice(picks, size))
            if (epoch, number) >= first:
                yield Mix(epoch, number, picked)


def mix_sizes(chunks: int, mix_chunks: int) -> list[int]:
    """Return the chunks of each mix of an epoch: the fewest mixes of at most `mix_chunks`; sizes differ by at most one.

    A small last mix would permute few rows, and be used up before the next one is decoded.
    """
    count = -(-chunks // mix_chunks)
    return [chunks // count + (number < chunks % count) for number in range(count)]


def mixed(rows: int, shuffle: Shuffle, mix: Mix) -> Ints:
    """Return the place in its mix, (rows,), of each row in the order of the picks."""
    halves = words(-(-rows // 2), shuffle.seed, Stream.READ_MIX, mix.number, mix.epoch).astype("<u8").view("<u4")
    places = np.arange(rows, dtype=np.int64)
    shuffle_places(halves.astype(np.uint32, copy=False), places)
    return places


def shuffle_places_plain(halves: NDArray[np.uint32], places: Ints) -> None:
    """Shuffle as `shuffle_places` does, in plain Python: the oracle of its tests."""
    counts = np.arange(1, len(places) + 1).astype(np.uint64)
    drawn = (halves.astype(np.uint64)[: len(places)] * counts) >> np.uint64(32)
    order = places.tolist()
    for i, j in zip(range(len(order) - 1, 0, -1), drawn[:0:-1].tolist(), strict=True):
        order[i], order[j] = order[j], order[i]
    places[:] = order


@compiled
def shuffle_places(halves: NDArray[np.uint32], places: Ints) -> None:
    """Shuffle places (R,) by Fisher and Yates: from the end, i is exchanged with halves[i] * (i + 1) >> 32."""
    for i in range(len(places) - 1, 0, -1):
        j = np.int64((np.uint64(halves[i]) * np.uint64(i + 1)) >> np.uint64(32))
        there = places[j]
        places[j] = places[i]
        places[i] = there


def check_position(state: Position | None) -> tuple[int, int]:
    """Return (epoch, number of the mix) of a position, (0, 0) for None. Raises UsageError for an invalid position."""
    if state is None:
        return 0, 0
    if set(state) != set(POSITION) or min(state.values()) < 0:
        raise UsageError(f"A position has {', '.join(POSITION)}, each at least 0; got {state}.")
    return state["epoch"], state["group"]
