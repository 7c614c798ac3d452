"""A local file of text: one row of a table is one document; a `.txt` file is one document as a whole.

No rule about blank lines fits every text, so a `.txt` file is not split. Opening a file costs one pass over it, for its
sha256. A shuffled file is permuted as a whole, for which `datasets` copies it to its cache.
"""

import hashlib
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from gsae.errors import NotFoundError, UsageError
from gsae.store import DatasetSource

from .dataset_rows import load_rows, read_rows
from .document import Document, Text, TextRequest, check_untokenised
from .shuffling import shuffled_ids

# File ending -> builder of `datasets`, and its options.
FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".jsonl.gz": ("json", {}),
    ".jsonl.zst": ("json", {}),
    ".txt": ("text", {"sample_by": "document"}),
    ".parquet": ("parquet", {}),
}
FORM = f"a local file in {', '.join(FORMATS)}"


def serves(dataset: str) -> bool:
    """Return whether `dataset` has the ending of a known format, or is any other path that exists."""
    return _ending(dataset) is not None or Path(dataset).expanduser().exists()


def open_text(request: TextRequest) -> Text:
    """Return the text. Raises NotFoundError if there is no such file, UsageError if its format is not known."""
    ending = _ending(request.dataset)
    if ending is None:
        raise UsageError(f"Text {request.dataset!r} has no known format. Known are: {', '.join(FORMATS)}.")
    path = Path(request.dataset).expanduser()
    digest = _sha256(path)
    builder, options = FORMATS[ending]
    if builder == "text":
        check_untokenised(request)
    field = "text" if builder == "text" else request.field
    load = partial(load_rows, path.name, builder, data_files=str(path.resolve()), split="train", **options)
    rows = partial(read_rows, path.name, field, request.tokenised)
    source = DatasetSource(id=path.name, revision=None, split="train", text_field=field, sha256=digest)
    seed = request.shuffle_seed
    if seed is None:
        stream = load(streaming=True)
        return Text(source, lambda: rows(stream, itertools.count()))

    def read_shuffled() -> Iterator[Document]:
        table = load(streaming=False)
        ids = shuffled_ids(0 if table is None else len(table), seed)
        return rows(None if table is None else table.select(ids), ids)

    return Text(source, read_shuffled)


def _ending(dataset: str) -> str | None:
    return next((ending for ending in FORMATS if dataset.endswith(ending)), None)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise NotFoundError(f"There is no text {str(path)!r}.") from None
    except OSError as error:
        raise NotFoundError(f"Text {str(path)!r} cannot be read: {error.strerror}.") from None
