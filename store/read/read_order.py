"""In which order rows are read: windows, chunks, groups and the mixing inside a group, as pure functions of a seed.

Windows come in seeded order, `open_windows` at a time; the next chunk is a seeded draw among them; the chunks of an
epoch are cut into equal groups of at most `mix`, and the rows of a group are permuted as one. So a position in a stream
is four integers, and nothing is remembered. The words are Philox's and all arithmetic is of integers: the order never
changes with a library. It costs 0.2 ms for a group of 65,536 rows.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsae.errors import UsageError
from gsae.store.codec.numba_support import compiled
from gsae.store.format.row_order import Ints, Stream, permutation, words

POSITION = ("epoch", "group", "offset", "skipped")


@dataclass(frozen=True)
class Shuffle:
    """What the order of rows depends on, beside the store."""

    seed: int
    mix: int
    open_windows: int


@dataclass(frozen=True)
class Pick:
    """A chunk to read; `last` when no other chunk of its window follows in the epoch.

    window: its place among the windows there are.
    """

    window: int
    chunk: int
    last: bool


def window_order(windows: int, shuffle: Shuffle, epoch: int) -> list[int]:
    """Return the windows in the order in which an epoch opens them."""
    order: list[int] = permutation(windows, shuffle.seed, Stream.READ_WINDOWS, epoch=epoch).tolist()
    return order


def schedule(chunks: Sequence[int], shuffle: Shuffle, epoch: int) -> Iterator[Pick]:
    """Yield every chunk of an epoch in the order in which they are read; chunks: how many each window has."""
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
class Group:
    """Chunks that are decoded and mixed together."""

    epoch: int
    number: int
    picks: tuple[Pick, ...]


def groups(chunks: Sequence[int], shuffle: Shuffle, epochs: int | None, first: tuple[int, int]) -> Iterator[Group]:
    """Yield the groups from (epoch, group) `first` on; epochs: None for no end."""
    sizes = group_sizes(sum(chunks), shuffle.mix)
    for epoch in itertools.count(first[0]) if epochs is None else range(first[0], epochs):
        picks = schedule(chunks, shuffle, epoch)
        for number, size in enumerate(sizes):
            picked = tuple(itertools.islice(picks, size))
            if (epoch, number) >= first:
                yield Group(epoch, number, picked)


def group_sizes(chunks: int, mix: int) -> list[int]:
    """Return the chunks of each group of an epoch: the fewest groups of at most `mix`, alike but for one chunk.

    A small rest would mix badly and be used up before the group after it is decoded.
    """
    count = -(-chunks // mix)
    return [chunks // count + (number < chunks % count) for number in range(count)]


def mixed(rows: int, shuffle: Shuffle, group: Group) -> Ints:
    """Return the place in its group, (rows,), of each row in the order of the picks."""
    halves = words(-(-rows // 2), shuffle.seed, Stream.READ_MIX, group.number, group.epoch).astype("<u8").view("<u4")
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
    """Shuffle places (R,) by Fisher and Yates: from the end, place i changes with place halves[i] * (i + 1) >> 32."""
    for i in range(len(places) - 1, 0, -1):
        j = np.int64((np.uint64(halves[i]) * np.uint64(i + 1)) >> np.uint64(32))
        there = places[j]
        places[j] = places[i]
        places[i] = there


def check_position(state: dict[str, int] | None) -> tuple[int, int]:
    """Return (epoch, group) of a position, (0, 0) for None; raises UsageError when it is none."""
    if state is None:
        return 0, 0
    if set(state) != set(POSITION) or min(state.values()) < 0:
        raise UsageError(f"A position has {', '.join(POSITION)}, each 0 or more; got {state}.")
    return state["epoch"], state["group"]
