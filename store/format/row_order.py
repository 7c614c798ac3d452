"""Which rows exist, in which order, and in which batches the language model runs over them: pure functions.

Everything follows from (tokens, seed, window number), so any worker can make a window at any time without scratch
space, and a verifier can compute what must stand where. Randomness is `Philox(key, counter).random_raw` and a stable
argsort, which numpy does not change. It costs one sort of the rows of a window.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Split = Literal["train", "heldout"]
# The index of a split here is its number in `contexts/split` and `documents/split`.
SPLITS: tuple[Split, ...] = ("train", "heldout")


class Stream(IntEnum):
    """The independent uses of one seed. The numbers are part of the format and are never reused."""

    HELDOUT = 1
    TRAIN_CONTEXTS = 2
    HELDOUT_CONTEXTS = 3
    TRAIN_ROWS = 4
    HELDOUT_ROWS = 5
    READ_WINDOWS = 6
    READ_CHUNKS = 7
    READ_DRAWS = 8
    READ_MIX = 9
    DOCUMENTS = 10


def words(n: int, seed: int, stream: Stream, index: int = 0, epoch: int = 0) -> NDArray[np.uint64]:
    """Return the first `n` words of Philox4x64 with key (seed, stream) and counter (0, 0, index, epoch)."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, index, epoch], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(n), dtype=np.uint64)


def word(seed: int, stream: Stream, index: int) -> int:
    """Return one word in [0, 2^64)."""
    return int(words(1, seed, stream, index)[0])


def permutation(n: int, seed: int, stream: Stream, index: int = 0, epoch: int = 0) -> Ints:
    """Return a permutation of range(n), (n,): the stable argsort of `words`."""
    return np.argsort(words(n, seed, stream, index, epoch), kind="stable").astype(np.int64, copy=False)


def row_mask(tokens: NDArray[np.int32], excluded_ids: tuple[int, ...], dropped_positions: tuple[int, ...]) -> Mask:
    """Return which positions of `tokens` (contexts, context_size) are rows: not special and not dropped."""
    mask: Mask = ~np.isin(tokens, np.asarray(excluded_ids, dtype=np.int32))
    mask[:, [p for p in dropped_positions if p < tokens.shape[1]]] = False
    return mask


@dataclass(frozen=True)
class Window:
    """One window of a split: its contexts in laid order, and how many of their rows it skips and takes."""

    index: int
    contexts: Ints
    skip: int
    rows: int

    def sources(self, mask: Mask) -> Ints:
        """Return `context * context_size + position` of each row in laid order, (rows,).

        mask: (contexts of this window, context_size), as `row_mask` gives it.
        """
        context, position = np.nonzero(mask)
        flat: Ints = self.contexts[context] * mask.shape[1] + position
        return flat[self.skip : self.skip + self.rows]


@dataclass(frozen=True)
class Layout:
    """The contexts of a split in permuted order, laid end to end and cut into windows.

    contexts: (contexts,) indices in laid order. starts: (contexts + 1,) number of rows before each. The last window
    may be shorter; rows beyond `rows` (more text than was needed) belong to no window.
    """

    contexts: Ints
    starts: Ints
    rows: int
    window_rows: int

    @property
    def windows(self) -> int:
        """Number of windows."""
        return -(-self.rows // self.window_rows)

    def window(self, index: int) -> Window:
        """Return window `index`; a context on its boundary belongs to both windows."""
        start = index * self.window_rows
        stop = min(start + self.window_rows, self.rows)
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))
        return Window(index, self.contexts[first:last], start - int(self.starts[first]), stop - start)


def layout(
    splits: NDArray[np.uint8], counts: Ints, split: Split, seed: int, window_rows: int, rows: int | None
) -> Layout:
    """Lay the contexts of a split end to end in seeded order.

    splits, counts: (contexts,) the split (0 train, 1 held out) and the number of rows of each context. rows: how many
    rows to lay at most; None for all.
    """
    mine = np.flatnonzero(splits == SPLITS.index(split)).astype(np.int64)
    stream = Stream.TRAIN_CONTEXTS if split == "train" else Stream.HELDOUT_CONTEXTS
    laid = mine[permutation(len(mine), seed, stream)]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[laid], dtype=np.int64)])
    total = int(starts[-1])
    return Layout(laid, starts, total if rows is None else min(rows, total), window_rows)


def stored_order(window: Window, split: Split, seed: int) -> Ints:
    """Return the laid row at each stored position of a window, (rows,)."""
    stream = Stream.TRAIN_ROWS if split == "train" else Stream.HELDOUT_ROWS
    return permutation(window.rows, seed, stream, window.index)


def inverse(order: Ints) -> Ints:
    """Return the stored position of each laid row, (rows,): the inverse permutation."""
    positions = np.empty_like(order)
    positions[order] = np.arange(len(order))
    return positions


def context_batches(contexts: int, batch_size: int) -> Iterator[slice]:
    """Split `contexts` contexts into ceil(contexts / batch_size) batches whose sizes differ by at most one.

    Part of the format: the bits of a row may depend on the other contexts of its batch, so batches never change.
    """
    count = -(-contexts // batch_size)
    bounds = [contexts * i // count for i in range(count + 1)] if count else [0]
    yield from itertools.starmap(slice, itertools.pairwise(bounds))
