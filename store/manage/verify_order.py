"""What the rows of a store must be, computed from its plan and tokens alone: which rows, where, and in which split.

The order is checked completely: every stored source is compared with the one that the plan's permutations give. A
difference is then named (not a row, of the other split, repeated, at another place). It takes two bytes of memory a
token.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import GsaeError
from gsae.store.codec.chunks import raw_sha256
from gsae.store.format.arrays import DOCUMENTS, split_rows
from gsae.store.format.row_order import SPLITS, Ints, Layout, Mask, Split, layout, row_mask, stored_order
from gsae.store.read.contexts_reader import context_parts, sum_faults
from gsae.store.read.store import Store


class OrderCheck:
    """Compares the sources of each window with what they must be, and remembers which positions occurred."""

    def __init__(self, seed: int, mask: Mask, splits: NDArray[np.uint8], layouts: Mapping[Split, Layout]) -> None:
        """Check against a plan's seed and tokens.

        mask: (contexts, context_size) which positions are rows. splits: (contexts,). layouts: of the splits for which
        tokens and plan give the same number of rows.
        """
        self._seed, self._mask, self._splits, self._layouts = seed, mask, splits, layouts
        self._seen = np.zeros(mask.size, bool)
        self._lock = threading.Lock()

    def sources(self, split: Split, window: int) -> Ints | None:
        """Return the sources of a window in stored order, (rows,); None if tokens and plan disagree about the rows."""
        if split not in self._layouts:
            return None
        own = self._layouts[split].window(window)
        laid: Ints = own.sources(self._mask[own.contexts])
        return laid[stored_order(own, split, self._seed)]

    def fault(self, split: Split, found: Ints, expected: Ints | None) -> str | None:
        """Return what is wrong with the sources `found` (rows,) of a chunk; None if nothing is.

        Call it once for each chunk, from any thread. expected: the part of `sources` for this chunk.
        """
        flat = self._mask.reshape(-1)
        if len(found) and (found.min() < 0 or found.max() >= len(flat)):
            return "sources lie outside the tokens."
        if not flat[found].all():
            return "sources are of tokens that are no rows."
        if (self._splits[found // self._mask.shape[1]] != SPLITS.index(split)).any():
            return f"sources are of contexts that are not {split}."
        if self._repeats(found):
            return "sources repeat: their rows are in the store twice."
        if expected is not None and not np.array_equal(found, expected):
            return "sources are not in the order that the plan dictates."
        return None

    def _repeats(self, found: Ints) -> bool:
        with self._lock:
            repeated = bool(self._seen[found].any()) or len(np.unique(found)) < len(found)
            self._seen[found] = True
        return repeated


def prepare_order_check(store: Store) -> tuple[OrderCheck | None, list[str]]:
    """Read all tokens; return the check of the rows, and the faults of tokens and documents.

    The check is None if the tokens are damaged.
    """
    plan, c = store.plan, store.plan.contexts

    def parts(path: str) -> Iterator[NDArray[Any]]:
        return context_parts(c, path, partial(store.shard, io="pread"))

    mask, first, digest = np.empty((c.contexts, c.context_size), bool), 0, hashlib.sha256()
    try:
        for tokens in parts("contexts/tokens"):
            digest.update(tokens.data)
            mask[first : first + len(tokens)] = row_mask(tokens, plan.tokenizer.excluded_ids, plan.dropped_positions)
            first += len(tokens)
        splits, *documents = (np.concatenate(list(parts(path))) for path in ("contexts/split", *DOCUMENTS))
    except GsaeError as error:
        return None, [str(error)]
    faults = sum_faults(store.name, c, digest.hexdigest(), raw_sha256([splits]), raw_sha256(documents))
    if faults:
        return None, faults
    layouts = {}
    for split in SPLITS:
        rows = plan.rows if split == "train" else None
        laid = layout(splits, mask.sum(axis=1), split, plan.seed, plan.window_rows, rows)
        if laid.rows == split_rows(plan, split):
            layouts[split] = laid
        else:
            faults.append(
                f"The tokens of {store.name} give {laid.rows} {split} rows; the plan has {split_rows(plan, split)}."
            )
    faults += _document_faults(store.name, splits, c.context_size, *documents)
    return OrderCheck(plan.seed, mask, splits, layouts), faults


def _document_faults(
    where: str, splits: NDArray[np.uint8], context_size: int, start: Ints, ids: Ints, own: NDArray[np.uint8]
) -> Iterator[str]:
    """Check that train and held-out rows share no document: each lies in contexts of its split, under its own id.

    splits: (contexts,). start, ids, own: (documents,) the first token, the id and the split of each document.
    """
    if (np.diff(start) <= 0).any() or start[0] < 0 or start[-1] >= splits.size * context_size:
        yield f"{where}/documents/start is not ascending, or leads beyond the tokens."
        return
    if max(int(splits.max()), int(own.max())) >= len(SPLITS):
        yield f"{where}: contexts/split or documents/split has values other than 0 and 1."
    if wrong := int((splits[start // context_size] != own).sum()):
        yield f"{where}: {wrong} documents begin in contexts of another split."
    begun = np.searchsorted(start, np.arange(splits.size) * context_size + 1, side="right") - 1
    if wrong := int(((begun >= 0) & (own[begun] != splits)).sum()):
        yield f"{where}: {wrong} contexts begin inside a document of the other split."
    if shared := len(np.intersect1d(ids[own == 0], ids[own == 1])):
        yield f"{where}: {shared} documents are both in train and held out."
