"""The registry of text sources, and `documents`, which opens the text that `--dataset` names.

A source is a module with `FORM`, `serves` and `open_text` (`TextSource`). To add one, write the module and add it to
`SOURCES`. The first source that serves a name opens it; skipping, limiting and repeating documents is done here.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from gsae.errors import NotFoundError, UsageError
from gsae.store import DatasetSource

from . import builtin_pydoc, hub_datasets, local_files
from .document import Document, Text, TextRequest
from .finished_text import finished_text
from .mixing import mix
from .splitting import Split, split_documents


class TextSource(Protocol):
    """A kind of text. FORM: what its names look like, for error messages."""

    FORM: str

    def serves(self, dataset: str) -> bool:
        """Return whether this source opens the text named `dataset`."""

    def open_text(self, request: TextRequest) -> Text:
        """Return the text, with provenance that changes whenever its documents do.

        Raises NotFoundError if there is no such text, and UsageError if it has no documents of the wanted kind.
        """


# In the order in which they are asked.
SOURCES: tuple[TextSource, ...] = (builtin_pydoc, local_files, hub_datasets)


def documents(
    dataset: str | Sequence[str],
    revision: str | None = None,
    split: str = "train",
    field: str = "text",
    *,
    tokenised: bool = False,
    shuffle_seed: int | None = None,
    skip: int = 0,
    maximum: int | None = None,
    repeat: bool = False,
    skip_bad: bool = False,
    split_into: Split | None = None,
    weights: Sequence[float] = (),
    finished: DatasetSource | None = None,
) -> Text:
    """Return a text: `maximum` documents (None: all) after the first `skip`, repeated without end if `repeat`.

    The documents are in source order, or shuffled. dataset: `builtin:pydoc`, a local file, folder or glob
    (`file_names.py`), or a Hub id (`owner/name`, or `owner/name:config`). field: the field that holds the text, or the
    token ids if `tokenised`. skip_bad: a row that gives no document is an empty document, marked as bad; otherwise it
    is refused. finished: the text that finished tokens were made from; the text itself may then be gone, and the Hub is
    not asked. Raises NotFoundError if there is no such text. Raises UsageError, here or while reading, for a missing
    field, a row of another type, and a text that is empty. split_into: long documents are cut (`splitting.py`). Several
    texts are interleaved by weights (`mixing.py`).
    """
    names = (dataset,) if isinstance(dataset, str) else tuple(dataset)
    texts = [
        _open(TextRequest(name, revision, split, field, tokenised, shuffle_seed, split_into), recorded)
        for name, recorded in zip(names, _recorded(finished, len(names)), strict=True)
    ]
    text = texts[0] if len(texts) == 1 else mix(texts, weights or (1.0,) * len(texts))
    provenance = text.source.model_copy(
        update={
            "skip_documents": skip,
            "max_documents": maximum,
            "tokenised": tokenised,
            "shuffle_seed": shuffle_seed,
            "repeat": repeat,
            "split_documents": split_into,
        }
    )
    end = None if maximum is None else skip + maximum

    def read_once() -> Iterator[Document]:
        found = text.read() if skip_bad else _refuse_bad(text.read())
        parts = split_documents(found, split_into) if split_into else found
        return itertools.islice(parts, skip, end)

    return Text(provenance, partial(_read_repeatedly, read_once) if repeat else read_once)


def _recorded(finished: DatasetSource | None, texts: int) -> Sequence[DatasetSource | None]:
    """Return what is recorded of each of several texts; None where nothing is, or another number of texts."""
    recorded = finished.mixed if finished and finished.mixed else (finished,)
    return recorded if len(recorded) == texts else (None,) * texts


def _open(request: TextRequest, finished: DatasetSource | None) -> Text:
    text = _found(request, finished)
    return Text(text.source, lambda: _refuse_empty(text.read(), text.source.id))


def _found(request: TextRequest, finished: DatasetSource | None) -> Text:
    source = next((source for source in SOURCES if source.serves(request.dataset)), None)
    if finished is not None and source in (None, hub_datasets):
        return finished_text(request, finished)
    if source is None:
        forms = "; ".join(source.FORM for source in SOURCES)
        raise NotFoundError(f"There is no text {request.dataset!r}. A text is one of: {forms}.")
    try:
        return source.open_text(request)
    except NotFoundError:
        if finished is None:
            raise
        return finished_text(request, finished)


def _read_repeatedly(read_once: Callable[[], Iterator[Document]]) -> Iterator[Document]:
    """Yield the documents again and again, marked from the second time on; end if there are none."""
    yield from read_once()
    while True:
        empty = True
        for document in read_once():
            empty = False
            yield document._replace(again=True)
        if empty:
            return


def _refuse_bad(documents: Iterator[Document]) -> Iterator[Document]:
    """Yield the documents; raise UsageError for the first row that gives none."""
    for document in documents:
        if document.bad:
            raise UsageError(f"{document.bad}. With --bad-rows skip such rows are left out and counted.")
        yield document


def _refuse_empty(documents: Iterator[Document], name: str) -> Iterator[Document]:
    """Yield the documents; raise UsageError at the end if none of them had any content."""
    empty, bad = True, ""
    for document in documents:
        content, bad = document.content, bad or document.bad or ""
        empty = empty and not (content.strip() if isinstance(content, str) else len(content))
        yield document
    if empty:
        raise UsageError(f"Text {name!r} is empty: it has no document with any text in it.{bad and f' {bad}.'}")
