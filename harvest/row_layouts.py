"""Which rows a store has, and in which order: counted from the tokens alone, before the model is loaded.

A token gives a row unless it is special or its position is dropped. Counting takes one pass over the tokens, a few
thousand contexts at a time.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsae.store import Layout, Split, layout, row_mask

from .request import Request

COUNTED_CONTEXTS = 4096


@dataclass(frozen=True)
class RowLayouts:
    """The contexts of each split in the order in which their rows are stored."""

    train: Layout
    heldout: Layout

    def of(self, split: Split) -> Layout:
        """Return the layout of a split."""
        return self.train if split == "train" else self.heldout

    @property
    def rows(self) -> int:
        """Rows of both splits."""
        return self.train.rows + self.heldout.rows


def row_layouts(request: Request, tokens: NDArray[np.int32], split: NDArray[np.uint8]) -> RowLayouts:
    """Return the layouts of both splits under the settings of `request`.

    tokens: (contexts, context_size). split: (contexts,), 0 train, 1 held out.
    """
    config = request.config
    counts = np.empty(len(tokens), np.int64)
    for first in range(0, len(tokens), COUNTED_CONTEXTS):
        part = slice(first, first + COUNTED_CONTEXTS)
        mask = row_mask(tokens[part], request.special.excluded_ids, config.dropped_positions)
        counts[part] = mask.sum(axis=1, dtype=np.int64)
    return RowLayouts(
        layout(split, counts, "train", config.seed, config.window_rows, config.rows),
        layout(split, counts, "heldout", config.seed, config.window_rows, None),
    )
