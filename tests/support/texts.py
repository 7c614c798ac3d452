"""Texts and the contexts that are made of them, as one value."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.harvest import Block, Document, tokenise


@dataclass(frozen=True)
class Contexts:
    """All blocks end to end: the five arrays of a store, and the documents that were read for them."""

    tokens: NDArray[np.int32]
    split: NDArray[np.uint8]
    document_start: NDArray[np.int64]
    document_id: NDArray[np.int64]
    document_split: NDArray[np.uint8]
    read: int


def numbered(texts: Iterable[Any]) -> list[Document]:
    """Return documents numbered in order."""
    return [Document(number, text) for number, text in enumerate(texts)]


def contexts_of(texts: Iterable[Any], tokenizer: Any, **settings: Any) -> Contexts:
    """Return the contexts of some texts, or of documents."""
    settings = {"rows": None, "heldout": 0.0, "seed": 0, **settings}
    every = [text if isinstance(text, Document) else Document(i, text) for i, text in enumerate(texts)]
    return joined(list(tokenise(every, tokenizer, **settings)), settings["context_size"])


def joined(blocks: list[Block], context_size: int) -> Contexts:
    """Lay blocks end to end."""
    before = np.cumsum([0, *(len(block.tokens) for block in blocks)]) * context_size
    starts = [block.start + offset for block, offset in zip(blocks, before[:-1], strict=True)]
    none = np.empty(0, np.int64)
    return Contexts(
        np.concatenate([np.empty((0, context_size), np.int32), *(block.tokens for block in blocks)]),
        np.concatenate([np.empty(0, np.uint8), *(block.split for block in blocks)]),
        np.concatenate([none, *starts]),
        np.concatenate([none, *(block.id for block in blocks)]),
        np.concatenate([np.empty(0, np.uint8), *(block.document_split for block in blocks)]),
        sum(block.read for block in blocks),
    )
