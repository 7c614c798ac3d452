"""The text of tokens that are finished: neither its files nor the Hub are needed again, only what identifies it.

A text that is still on this machine is compared, so that a changed file is named. What is gone, or on the Hub, is taken
to be the text that the tokens were made from, if the settings name the same one.
"""

import re
from collections.abc import Iterator

from gsae.errors import NotFoundError
from gsae.store import DatasetSource

from .document import Document, Text, TextRequest
from .file_formats import format_of
from .file_names import text_id

COMMIT = re.compile(r"[0-9a-f]{40}")


def finished_text(request: TextRequest, recorded: DatasetSource) -> Text:
    """Return the text that the settings name, with what only the text itself could tell taken from `recorded`."""
    local = recorded.revision is None
    is_same = recorded.id in (request.dataset, text_id(request.dataset))
    commit = request.revision if COMMIT.fullmatch(request.revision or "") else recorded.revision
    source = recorded.model_copy(
        update={
            "id": recorded.id if is_same else request.dataset,
            "revision": None if local else commit,
            "split": recorded.split if local and not recorded.files else request.split,
            "text_field": "text" if local and _is_txt(recorded) else request.field,
        }
    )
    return Text(source, lambda: _gone(request.dataset))


def _is_txt(recorded: DatasetSource) -> bool:
    formats = [format_of(name) for name in recorded.files or (recorded.id,)]
    return all(format is not None and format.format == "txt" for format in formats)


def _gone(dataset: str) -> Iterator[Document]:
    raise NotFoundError(f"There is no text {dataset!r}, which has to be read again.")
