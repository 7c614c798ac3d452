"""Where the text comes from: documents with their places in the source, and the provenance that names exactly these.

A `builtin:pydoc` that every Python has, local files and Hub data sets, the last two through `datasets`, streamed, so a
text is never held whole. A `.txt` file is one document (no rule for blank lines fits every text); a line of `.jsonl` or
a row of `.parquet` is one. It costs one extra pass over a local file, for its hash. Shuffled, a local file is permuted
as a whole, for which `datasets` lays it down in its own cache; of a Hub text, which is never there as a whole, each
2^14 documents are permuted in memory. The permutations are the store's own, so they never change with a library.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gsae.errors import NotFoundError, UsageError
from gsae.harvest.hub import explain, one_line, pin, quiet
from gsae.store import DatasetSource, Stream, permutation

PYDOC = "builtin:pydoc"
# File ending -> builder of `datasets` and its options.
FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".jsonl.gz": ("json", {}),
    ".jsonl.zst": ("json", {}),
    ".txt": ("text", {"sample_by": "document"}),
    ".parquet": ("parquet", {}),
}
REPEATS_OVER = 20
PART_CHARACTERS = 8000
ROWS_AT_A_TIME = 256
SHUFFLE_WITHIN = 1 << 14

Content = str | NDArray[np.int32]


class Document(NamedTuple):
    """A document: its place in the source, its text or token ids (tokens,), and whether it was read before."""

    place: int
    content: Content
    again: bool = False


@dataclass(frozen=True)
class Text:
    """A text: its provenance, and `read`, which reads its documents from the first one on at each call."""

    source: DatasetSource
    read: Callable[[], Iterator[Document]]


def documents(
    dataset: str,
    revision: str | None = None,
    split: str = "train",
    field: str = "text",
    *,
    tokenised: bool = False,
    shuffle_seed: int | None = None,
    skip: int = 0,
    maximum: int | None = None,
    repeat: bool = False,
) -> Text:
    """Return a text: `maximum` documents (None: all) after `skip`, in source order or shuffled; for ever by `repeat`.

    dataset: `builtin:pydoc`, a local `.jsonl[.gz|.zst]`, `.txt` or `.parquet` file, or a Hub id (`owner/name`, or
    `owner/name:config`). field: what holds the text or, where it is `tokenised`, the token ids. Raises NotFoundError
    where there is no such text. It, or the first step of a reading that meets it, raises UsageError for a missing
    field, a row that is not what the field should hold, or a text without any.
    """
    if dataset.startswith("builtin:"):
        found = _builtin(dataset, tokenised, shuffle_seed)
    elif ending := next((e for e in FORMATS if dataset.endswith(e)), None):
        found = _local(Path(dataset).expanduser(), ending, field, tokenised, shuffle_seed)
    elif Path(dataset).expanduser().exists():
        raise UsageError(f"Text {dataset!r} is of no known format. Known are files in {', '.join(FORMATS)}.")
    else:
        found = _hub(dataset, revision, split, field, tokenised, shuffle_seed)
    source = found.source.model_copy(
        update={
            "skip_documents": skip,
            "max_documents": maximum,
            "tokenised": tokenised,
            "shuffle_seed": shuffle_seed,
            "repeat": repeat,
        }
    )
    end = None if maximum is None else skip + maximum

    def once() -> Iterator[Document]:
        return itertools.islice(_not_empty(found.read(), source.id), skip, end)

    return Text(source, partial(_again_and_again, once) if repeat else once)


def _again_and_again(once: Callable[[], Iterator[Document]]) -> Iterator[Document]:
    yield from once()
    while True:
        empty = True
        for document in once():
            empty = False
            yield document._replace(again=True)
        if empty:
            return


def _not_empty(documents: Iterator[Document], name: str) -> Iterator[Document]:
    empty = True
    for document in documents:
        content = document.content
        empty = empty and not (content.strip() if isinstance(content, str) else len(content))
        yield document
    if empty:
        raise UsageError(f"Text {name!r} is empty: it has no document with any text in it.")


def pydoc() -> list[str]:
    """Return the standard library's language reference, sorted by topic, long topics in parts.

    Topics repeat one another (aliases, sections that stand again in longer topics). Taken longest topic first, a
    paragraph of over 20 characters that was seen before is dropped, so that held-out text is not in train. A document
    is at most 8,000 characters of whole paragraphs (one, if that is longer): a tenth of the documents is then about a
    tenth of the text whatever the seed, though topics differ a hundredfold in length.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n")):
            words = " ".join(paragraph.split())
            if words in seen:
                continue
            if len(words) > REPEATS_OVER:
                seen.add(words)
            paragraphs.append(paragraph)
        kept[name] = _parts(paragraphs)
    return [part for name in sorted(kept) for part in kept[name] if part.strip()]


def _parts(paragraphs: list[str]) -> list[str]:
    parts: list[str] = []
    for paragraph in paragraphs:
        if parts and len(parts[-1]) + len(paragraph) < PART_CHARACTERS:
            parts[-1] += "\n\n" + paragraph
        else:
            parts.append(paragraph)
    return parts


def _builtin(name: str, tokenised: bool, shuffle_seed: int | None) -> Text:
    if name != PYDOC:
        raise NotFoundError(f"There is no text {name!r}. There is: {PYDOC}.")
    _check_text(name, tokenised)
    texts = pydoc()
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    places = range(len(texts)) if shuffle_seed is None else _permutation(len(texts), shuffle_seed)
    source = DatasetSource(id=PYDOC, revision=None, split="train", text_field="text", sha256=digest)
    return Text(source, lambda: (Document(place, texts[place]) for place in places))


def _local(path: Path, ending: str, field: str, tokenised: bool, shuffle_seed: int | None) -> Text:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise NotFoundError(f"There is no text {str(path)!r}.") from None
    except OSError as error:
        raise NotFoundError(f"Text {str(path)!r} cannot be read: {error.strerror}.") from None
    builder, options = FORMATS[ending]
    if builder == "text":
        _check_text(path.name, tokenised)
        field = "text"
    load = partial(_load, path.name, builder, data_files=str(path.resolve()), split="train", **options)
    source = DatasetSource(id=path.name, revision=None, split="train", text_field=field, sha256=digest)
    rows = partial(_rows, path.name, field, tokenised)
    if shuffle_seed is None:
        stream = load(streaming=True)
        return Text(source, lambda: rows(stream, itertools.count()))

    def permuted() -> Iterator[Document]:
        table = load(streaming=False)
        places = _permutation(0 if table is None else len(table), shuffle_seed)
        return rows(None if table is None else table.select(places), places)

    return Text(source, permuted)


def _hub(name: str, revision: str | None, split: str, field: str, tokenised: bool, shuffle_seed: int | None) -> Text:
    repository, _, config = name.partition(":")
    commit = pin("dataset", repository, revision)
    stream = _load(name, repository, name=config or None, revision=commit, split=split, streaming=True)
    source = DatasetSource(id=name, revision=commit, split=split, text_field=field, sha256=None)
    rows = partial(_rows, name, field, tokenised)
    if shuffle_seed is None:
        return Text(source, lambda: rows(stream, itertools.count()))
    within = source.model_copy(update={"shuffle_within": SHUFFLE_WITHIN})
    return Text(within, lambda: _shuffled(rows(stream, itertools.count()), shuffle_seed))


def _check_text(name: str, tokenised: bool) -> None:
    if tokenised:
        raise UsageError(f"Text {name!r} has no field with token ids: it is text. Leave out --token-field.")


def _permutation(n: int, seed: int, index: int = 0) -> list[int]:
    places: list[int] = permutation(n, seed, Stream.DOCUMENTS, index).tolist()
    return places


def _shuffled(documents: Iterator[Document], seed: int) -> Iterator[Document]:
    """Permute each SHUFFLE_WITHIN documents among themselves."""
    for index in itertools.count():
        block = list(itertools.islice(documents, SHUFFLE_WITHIN))
        if not block:
            return
        yield from (block[i] for i in _permutation(len(block), seed, index))


def _load(dataset: str, builder: str, **options: Any) -> Any:
    """Return `datasets`' stream or table, or None for a file that has no rows at all."""
    with quiet(bars=options["streaming"]):
        from datasets import load_dataset

        try:
            return load_dataset(builder, **options)
        except StopIteration:  # what the json builder raises for a file without a line
            return None
        except Exception as error:  # arrow's, the Hub's, the system's and its own types
            raise explain("dataset", dataset, _told_by(error)) from None


def _told_by(error: Exception) -> Exception:
    """Return what went wrong where `datasets` says only that something did."""
    cause = error.__cause__
    return cause if type(error).__name__ == "DatasetGenerationError" and isinstance(cause, Exception) else error


def _rows(name: str, field: str, tokenised: bool, table: Any, places: Iterable[int]) -> Iterator[Document]:
    """Read the documents of a stream or table of `datasets`, which stand at `places` in the source."""
    content: Callable[[Any], Content | None] = _token_ids if tokenised else _text
    needed = "a list of token ids is needed" if tokenised else "text is needed (for token ids: --token-field)"
    batches = iter(()) if table is None else table.iter(batch_size=ROWS_AT_A_TIME)
    following, row = iter(places), 0
    while True:
        with quiet():
            try:
                batch = next(batches, None)
            except UnicodeDecodeError:
                raise UsageError(f"Text {name!r} is not UTF-8 (after row {row}).") from None
            except Exception as error:  # arrow's, the Hub's, the system's and its own types
                raise UsageError(f"Text {name!r} cannot be read after row {row}: {one_line(error)}.") from None
        if batch is None:
            return
        if field not in batch:
            raise UsageError(f"Text {name!r} has no field {field!r}. It has: {', '.join(sorted(batch))}.")
        for value, place in zip(batch[field], following, strict=False):
            held = content(value)
            if held is None:
                found = "nothing" if value is None else f"a value of type {type(value).__name__}"
                raise UsageError(f"Text {name!r}, row {place}: field {field!r} holds {found}; {needed}.")
            yield Document(place, held)
            row += 1


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _token_ids(value: Any) -> NDArray[np.int32] | None:
    if not isinstance(value, list):
        return None
    try:
        ids = np.asarray(value or np.empty(0, np.int64))
    except ValueError:  # lists of different lengths
        return None
    fits = ids.ndim == 1 and ids.dtype.kind in "iu" and (not len(ids) or 0 <= ids.min() <= ids.max() < 1 << 31)
    return ids.astype(np.int32) if fits else None
