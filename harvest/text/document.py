"""What every source of text gives: numbered documents, and the provenance that identifies exactly these."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gsae.errors import UsageError
from gsae.store import DatasetSource

Content = str | NDArray[np.int32]
"""Text, or token ids (tokens,)."""


class Document(NamedTuple):
    """A document: its number in the source, its text or token ids, and whether it was read before (`--repeat`)."""

    id: int
    content: Content
    again: bool = False


@dataclass(frozen=True)
class Text:
    """A text: its provenance, and `read`, which reads its documents from the first one at each call."""

    source: DatasetSource
    read: Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class TextRequest:
    """Which text is wanted.

    dataset: the value of `--dataset`. revision, split: of a data set on the Hub. field: the field that holds the text,
    or the token ids if `tokenised`. shuffle_seed: seed of the order of the documents; None for the source's own order.
    """

    dataset: str
    revision: str | None = None
    split: str = "train"
    field: str = "text"
    tokenised: bool = False
    shuffle_seed: int | None = None


def check_untokenised(request: TextRequest) -> None:
    """Raise UsageError if token ids are wanted of a source that has only text."""
    if request.tokenised:
        raise UsageError(f"Text {request.dataset!r} has text and no field with token ids. Leave out --token-field.")
