"""What the rows of a store must be, from its plan and tokens alone: which they are, where each stands, in which split.

The order is proved, not sampled: every stored source is compared with the one that the plan's permutations put
there. What is not as it should be is then told apart (no row, another split's, seen before, another's place). Held
in memory: two bytes a token.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import GsaeError
from gsae.store.codec.chunks import raw_sha256
from gsae.store.format.arrays import rows_of
from gsae.store.format.row_order import SPLITS, Ints, Layout, Mask, Split, layout, row_mask, stored_order
from gsae.store.read.store import Store
from gsae.store.write.contexts_writer import DOCUMENTS, context_parts, sum_faults


@dataclass(frozen=True)
class Expected:
    """What each window's sources must be.

    mask: (contexts, context_size) which positions are rows. splits: (contexts,). layouts: those of the splits whose
    tokens give the plan's number of rows. seen: (contexts * context_size,) the positions met so far, for repeats.
    """

    seed: int
    mask: Mask
    splits: NDArray[np.uint8]
    layouts: Mapping[Split, Layout]
    seen: NDArray[np.bool_]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def sources(self, split: Split, window: int) -> Ints | None:
        """Return the sources of a window in stored order, (rows,); None where tokens and plan disagree."""
        if split not in self.layouts:
            return None
        own = self.layouts[split].window(window)
        laid: Ints = own.sources(self.mask[own.contexts])
        return laid[stored_order(own, split, self.seed)]

    def fault(self, split: Split, found: Ints, due: Ints | None) -> str | None:
        """Say what is wrong with the sources `found` (rows,) of a chunk, of which every chunk is shown once."""
        flat = self.mask.reshape(-1)
        if len(found) and (found.min() < 0 or found.max() >= len(flat)):
            return "sources lie outside the tokens."
        if not flat[found].all():
            return "sources are of tokens that are no rows."
        if (self.splits[found // self.mask.shape[1]] != SPLITS.index(split)).any():
            return f"sources are of contexts that are not {split}."
        if self._repeats(found):
            return "sources repeat: their rows are in the store twice."
        if due is not None and not np.array_equal(found, due):
            return "sources are not in the order that the plan dictates."
        return None

    def _repeats(self, found: Ints) -> bool:
        with self.lock:
            repeated = bool(self.seen[found].any()) or len(np.unique(found)) < len(found)
            self.seen[found] = True
        return repeated


def expect(store: Store) -> tuple[Expected | None, list[str]]:
    """Return what the rows must be, None when the tokens are damaged, and the faults of tokens and documents."""
    plan, c = store.plan, store.plan.contexts

    def parts(path: str) -> Iterator[NDArray[Any]]:
        return context_parts(store.path, c, path, lambda spec, shard: store.shard(spec, shard, "pread"))

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
        budget = plan.rows if split == "train" else None
        laid = layout(splits, mask.sum(axis=1), split, plan.seed, plan.window_rows, budget)
        if laid.rows == rows_of(plan, split):
            layouts[split] = laid
        else:
            faults.append(
                f"The tokens of {store.name} give {laid.rows} {split} rows; the plan says {rows_of(plan, split)}."
            )
    faults += _document_faults(store.name, splits, c.context_size, *documents)
    return Expected(plan.seed, mask, splits, layouts, np.zeros(mask.size, bool)), faults


def _document_faults(
    where: str, splits: NDArray[np.uint8], context_size: int, start: Ints, ids: Ints, own: NDArray[np.uint8]
) -> Iterator[str]:
    """Train and held-out rows share no document: each lies in contexts of its own split, under an id of its own."""
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
