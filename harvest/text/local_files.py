"""Local files of text: one row of a table is one document; a `.txt` file is one document as a whole.

Opening a text costs one pass over its files, for their sha256. One file is open at a time. A text that is shuffled is
permuted as a whole: files of `.txt` as files, rows after a copy (`shuffled_copy.py`).
"""

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from gsae.errors import GsaeError, NotFoundError, UsageError
from gsae.harvest.hub import one_line
from gsae.store import DatasetSource

from .document import Document, Text, TextRequest, check_untokenised
from .file_formats import NAMES, open_bytes
from .file_names import TextFile, TextFiles, find_files, may_name_files
from .json_rows import json_lines, json_values
from .row_values import Value, document_of
from .shuffled_copy import shuffled_as_a_whole
from .shuffling import shuffled_ids
from .splitting import Split, parts_of
from .table_rows import arrow_rows, csv_rows, parquet_rows

FORM = f"a local file in {NAMES}, a folder or a glob of such files"
serves = may_name_files


def open_text(request: TextRequest) -> Text:
    """Return the text. Raises NotFoundError if there are no such files, UsageError if their format is not known."""
    found = find_files(request.dataset, request.split)
    is_txt = found.files[0].format.format == "txt"
    if is_txt:
        check_untokenised(request)
    field = "text" if is_txt else request.field
    source = _source(found, request.split, field)
    seed = request.shuffle_seed
    if is_txt:
        order = range(len(found.files)) if seed is None else shuffled_ids(len(found.files), seed)
        return Text(source, partial(_txt_documents, found.files, order, request.parts))
    rows = partial(_documents, found.files, field, request.tokenised)
    if seed is None:
        return Text(source, rows)
    return Text(source, lambda: shuffled_as_a_whole(rows(), seed, request.tokenised))


def _source(found: TextFiles, split: str, field: str) -> DatasetSource:
    hashes = {file.name: _sha256(file.path) for file in found.files}
    if found.single:
        (only,) = hashes.values()
        return DatasetSource(id=found.id, revision=None, split="train", text_field=field, sha256=only)
    listed = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())  # as the tool sha256sum prints them
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return DatasetSource(id=found.id, revision=None, split=split, text_field=field, sha256=digest, files=hashes)


def _documents(files: tuple[TextFile, ...], field: str, tokenised: bool) -> Iterator[Document]:
    """Yield the documents of all files, numbered through."""
    number = itertools.count()
    for file in files:
        for row, value in enumerate(_values(file, field)):
            yield document_of(next(number), value, file.name, row, field, tokenised)


def _values(file: TextFile, field: str) -> Iterator[Value]:
    """Yield the values of a file's rows. Raises UsageError with the place at which reading failed."""
    rows = -1
    try:
        for rows, value in enumerate(_rows(file, field)):  # noqa: B007
            yield value
    except Exception as error:  # of decompressors, arrow, csv, the system
        raise _unreadable(file, error, f" after row {rows}" if rows >= 0 else "") from None


def _rows(file: TextFile, field: str) -> Iterator[Value]:
    format = file.format
    if format.format == "parquet":
        yield from parquet_rows(file.path, field)
    elif format.format == "arrow":
        yield from arrow_rows(file.path, field)
    else:
        with open_bytes(file.path, format.compression) as data:
            if format.format == "csv":
                yield from csv_rows(data, field, "\t" if format.ending == ".tsv" else ",")
            else:
                yield from (json_values if format.format == "json" else json_lines)(data, field)


def _txt_documents(files: tuple[TextFile, ...], order: Iterable[int], parts: Split | None) -> Iterator[Document]:
    for number in order:
        file = files[number]
        name = None if parts is None else _sha256(file.path)
        try:
            with open_bytes(file.path, file.format.compression) as data, io.TextIOWrapper(data, "utf-8") as text:
                for content in [text.read()] if parts is None else parts_of(text, parts):
                    yield Document(number, content, part_of=name)
        except Exception as error:  # of decompressors and the system
            raise _unreadable(file, error, "") from None


def _unreadable(file: TextFile, error: Exception, where: str) -> GsaeError:
    if isinstance(error, UnicodeDecodeError):
        return UsageError(f"Text {file.name!r} is not UTF-8{where and f' ({where.strip()})'}.")
    return UsageError(f"Text {file.name!r} cannot be read{where}: {one_line(error)}.")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise NotFoundError(f"There is no text {str(path)!r}.") from None
    except OSError as error:
        raise NotFoundError(f"Text {str(path)!r} cannot be read: {error.strerror}.") from None
