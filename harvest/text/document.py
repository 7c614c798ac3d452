"""What every source of text gives: numbered documents, and the provenance that identifies exactly these.

A source may cut a long document into parts. Each part is a `Document` with the number of the whole, so that the store
knows what belongs together: a document is one independent draw of every interval, however it was cut.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gsae.errors import UsageError
from gsae.store import DatasetSource

Content = str | NDArray[np.int32]
"""Text, or token ids (tokens,)."""


class Document(NamedTuple):
    """A document, or a part of one.

    id: its number in the source, equal for all parts of a document. content: its text or token ids. again: whether it
    was read before (`--repeat`). part_of: the name of the document that it is a part of, which then decides its split;
    None for a whole document, of which the content decides. bad: what is wrong with a row that gives no document, with
    its place; its content is then empty.
    """

    id: int
    content: Content
    again: bool = False
    part_of: str | None = None
    bad: str | None = None


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
    parts: of documents into parts, for a source that would hold long ones as a whole.
    """

    dataset: str
    revision: str | None = None
    split: str = "train"
    field: str = "text"
    tokenised: bool = False
    shuffle_seed: int | None = None
    parts: int | Literal["blank-lines"] | None = None


def check_untokenised(request: TextRequest) -> None:
    """Raise UsageError if token ids are wanted of a source that has only text."""
    if request.tokenised:
        raise UsageError(f"Text {request.dataset!r} has text and no field with token ids. Leave out --token-field.")
