"""The held-out documents: the independent draws of every standard error and interval.

Tokens of one document are alike, and so are its contexts. A draw is therefore a document as a whole, however it was cut
before it was packed. Where several documents share a context, the context is not divided: it belongs to the one that
most of its tokens are of.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.store import SPLITS, Store, StoreSet

FEW_DOCUMENTS = 50


@dataclass(frozen=True)
class HeldoutDocuments:
    """contexts: numbers of the held-out contexts, ascending. document: (contexts,) the index of each one's document.

    count: of documents, which are numbered from 0 in the order of their numbers in the text.
    """

    contexts: NDArray[np.int64]
    document: NDArray[np.int64]
    count: int

    @classmethod
    def of(cls, store: Store | StoreSet) -> "HeldoutDocuments":
        """Find the held-out contexts of a store and their documents. The tokens of these contexts are read."""
        contexts = np.flatnonzero(store.split() == SPLITS.index("heldout")).astype(np.int64)
        numbers, document = np.unique(store.main_documents(contexts), return_inverse=True)
        return cls(contexts, document.reshape(-1).astype(np.int64), len(numbers))

    def of_contexts(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index of the document of each held-out context, given by its number."""
        return self.document[np.searchsorted(self.contexts, numbers)]


def sum_by(index: NDArray[np.int64], count: int, values: NDArray[Any]) -> NDArray[Any]:
    """Return the sums (..., count) of the values (..., n) with each index (n,), in the dtype of the values."""
    sums = np.zeros((count, *values.shape[:-1]), values.dtype)
    np.add.at(sums, index, np.moveaxis(values, -1, 0))
    return np.moveaxis(sums, 0, -1)


def few_documents(count: int | None, ran: int | None = None) -> str | None:
    """Return what to say where held-out documents are fewer than FEW_DOCUMENTS; None where they are not, or unknown.

    ran: of how many of them a context ran through the language model; None where it was not used.
    """
    if count is None or (count >= FEW_DOCUMENTS and (ran is None or ran >= FEW_DOCUMENTS)):
        return None
    if count >= FEW_DOCUMENTS:
        return (
            f"Only {ran} of {count:,} held-out documents ran through the language model: intervals of its scores are "
            f"rough below {FEW_DOCUMENTS}; run `gsae eval` with more --contexts."
        )
    remedy = "harvest with a larger --heldout or more text."
    if not count:
        return f"No held-out documents: nothing can be evaluated; {remedy}"
    held = f"{count} held-out document{'' if count == 1 else 's'}"
    return f"Only {held}: intervals over documents are rough below {FEW_DOCUMENTS}; {remedy}"
