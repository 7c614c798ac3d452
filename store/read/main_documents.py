"""The document of a context: the one that most of its tokens are of.

Several documents may be packed into a context. Whatever is summed by document must not divide a context, because its
tokens run through the model together; so the whole context counts for one document. Only the tokens of the contexts
that are asked for are needed.
"""

import numpy as np
from numpy.typing import NDArray

from gsae.store.format.row_order import Ints, row_mask


def main_documents(
    contexts: Ints, tokens: NDArray[np.int32], excluded_ids: tuple[int, ...], start: Ints, ids: Ints
) -> Ints:
    """Return for each context the number of the document that most of its tokens are of, (contexts,).

    contexts: their numbers, (contexts,). tokens: theirs, (contexts, context_size). excluded_ids: special tokens, which
    are of no document. start, ids: (documents,) flat index of each document's first token, ascending, and its number.
    Parts of one document count together. Of equal documents the first in the context is taken.
    """
    size = tokens.shape[1]
    context, position = np.nonzero(row_mask(tokens, excluded_ids, ()))
    part = np.searchsorted(start, contexts[context] * size + position, side="right") - 1
    # A context without tokens is of the document that it begins in.
    found: Ints = ids[np.maximum(np.searchsorted(start, contexts * size + 1, side="right") - 1, 0)]
    if not len(context):
        return found
    numbers, own = np.unique(ids[np.maximum(part, 0)], return_inverse=True)
    pairs, first, count = np.unique(context * len(numbers) + own, return_index=True, return_counts=True)
    of, document = np.divmod(pairs, len(numbers))
    order = np.lexsort((-first, count, of))  # the one wanted is the last of its context
    best = order[np.append(np.diff(of[order]) != 0, True)]
    found[of[best]] = numbers[document[best]]
    return found
