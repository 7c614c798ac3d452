"""The order of shuffled documents: the store's own permutations, so that no library's version changes the order."""

import itertools
from collections.abc import Iterator

from gsae.store import Stream, permutation

from .document import Document

SHUFFLE_WITHIN = 1 << 14


def shuffled_ids(count: int, seed: int, block: int = 0) -> list[int]:
    """Return the numbers 0 to count - 1 in the order of a seed; blocks have independent orders."""
    ids: list[int] = permutation(count, seed, Stream.DOCUMENTS, block).tolist()
    return ids


def shuffled_in_blocks(documents: Iterator[Document], seed: int) -> Iterator[Document]:
    """Permute each block of SHUFFLE_WITHIN documents, for a source that is too large to be permuted as a whole."""
    for number in itertools.count():
        block = list(itertools.islice(documents, SHUFFLE_WITHIN))
        if not block:
            return
        yield from (block[i] for i in shuffled_ids(len(block), seed, number))
