"""The row of a token: the inverse of the order that the plan defines, computed without an index on disk.

All tokens are read once (a byte a token is kept), and each window that is asked for costs one permutation of its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsae.errors import NotFoundError
from gsae.store.format.plan import Plan
from gsae.store.format.row_order import SPLITS, Ints, Layout, Mask, Split, inverse, layout, row_mask, stored_order


@dataclass(frozen=True)
class RowLookup:
    """The order of the rows of a split.

    mask: (contexts, context_size) which positions are rows. rank: (contexts,) the place of each context in laid order,
    -1 for contexts of the other split. windows: the numbers of the windows that the store has.
    """

    split: Split
    seed: int
    mask: Mask
    laid: Layout
    rank: Ints
    windows: Sequence[int]

    @classmethod
    def build(
        cls, plan: Plan, tokens: NDArray[np.int32], splits: NDArray[np.uint8], split: Split, windows: Sequence[int]
    ) -> "RowLookup":
        """Compute the order from tokens (contexts, context_size) and splits (contexts,)."""
        mask = row_mask(tokens, plan.tokenizer.excluded_ids, plan.dropped_positions)
        rows = plan.rows if split == SPLITS[0] else None
        laid = layout(splits, mask.sum(axis=1), split, plan.seed, plan.window_rows, rows)
        rank = np.full(len(tokens), -1, np.int64)
        rank[laid.contexts] = np.arange(len(laid.contexts))
        return cls(split, plan.seed, mask, laid, rank, windows)

    def row_numbers(self, sources: Ints) -> Ints:
        """Return the number of the row of each source (n,). Raises NotFoundError for a token that is not a row."""
        context, position = np.divmod(sources, self.mask.shape[1])
        inside = (sources >= 0) & (context < len(self.mask))
        context = np.where(inside, context, 0)
        before = np.arange(self.mask.shape[1]) < position[:, None]
        rank = self.rank[context]
        row = self.laid.starts[rank] + (self.mask[context] & before).sum(axis=1)
        window = row // self.laid.window_rows
        there = inside & self.mask[context, position] & (rank >= 0) & (row < self.laid.rows)
        there &= np.isin(window, self.windows)
        if not there.all():
            missing = np.divmod(sources[~there][0], self.mask.shape[1])
            raise NotFoundError(f"Token {missing[1]} of context {missing[0]} is no {self.split} row of this store.")
        return self._stored(row, window)

    def _stored(self, row: Ints, window: Ints) -> Ints:
        """Return the numbers of laid rows (n,), of windows (n,), counted through the windows that the store has."""
        found = np.empty_like(row)
        first = 0
        for number in self.windows:
            own = self.laid.window(number)
            mine = window == number
            if mine.any():
                positions = inverse(stored_order(own, self.split, self.seed))
                found[mine] = first + positions[row[mine] - number * self.laid.window_rows]
            first += own.rows
        return found


def around(tokens: NDArray[np.int32], positions: Ints, before: int, after: int) -> NDArray[np.int32]:
    """Return the tokens around positions (n,) of contexts (n, context_size), (n, before + 1 + after); -1 outside."""
    wanted = positions[:, None] + np.arange(-before, after + 1)
    inside = (wanted >= 0) & (wanted < tokens.shape[1])
    found = np.take_along_axis(tokens, np.where(inside, wanted, 0), axis=1)
    return np.where(inside, found, np.int32(-1))
