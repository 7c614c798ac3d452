"""Long documents cut into parts that are packed one after another; the document stays the unit of everything else.

All parts have the number of their document, and the sha256 of its text decides the split, so that they fall on one
side. Cut by length, the parts joined are the text. Cut at blank lines, these are lost. A document of one part is left
as it is. Of a file, one part is held at a time.
"""

import hashlib
import io
from collections.abc import Iterator
from itertools import chain, islice
from typing import IO, Literal

from .document import Document

Split = int | Literal["blank-lines"]
# Where a part ends, if one of these is in its second half: the first kind that is.
ENDS = ("\n\n", "\n", ". ", " ")


def split_documents(documents: Iterator[Document], split: Split) -> Iterator[Document]:
    """Yield the documents, those of text in parts. Documents that a source has cut stay as they are."""
    for document in documents:
        if not isinstance(document.content, str) or document.part_of is not None or not document.content:
            yield document
            continue
        parts = parts_of(io.StringIO(document.content, newline="\n"), split)
        few = list(islice(parts, 2))
        if len(few) < 2:
            yield document
            continue
        name = hashlib.sha256(document.content.encode()).hexdigest()
        yield from (document._replace(content=part, part_of=name) for part in chain(few, parts))


def parts_of(text: IO[str], split: Split) -> Iterator[str]:
    """Yield the parts of a text: paragraphs, or at most `split` characters that end at a paragraph, line or word."""
    return _paragraphs(text) if split == "blank-lines" else _pieces(text, split)


def _paragraphs(text: IO[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in text:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\r\n")
            lines = []
    if lines:
        yield "".join(lines).rstrip("\r\n")


def _pieces(text: IO[str], most: int) -> Iterator[str]:
    held = text.read(most + 1)
    while len(held) > most:
        at = _end(held, most)
        yield held[:at]
        held = held[at:] + text.read(at)
    if held:
        yield held


def _end(text: str, most: int) -> int:
    ends = (text.rfind(end, most // 2, most) + len(end) for end in ENDS if end in text[most // 2 : most])
    return next(ends, most)
