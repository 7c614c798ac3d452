"""Where the text comes from: documents in source order, and the provenance that names exactly this text.

A `builtin:pydoc` that every Python has, local files and Hub data sets, the last two through `datasets`,
streamed, so a text is never held whole. A `.txt` file is one document (no rule for blank lines fits every
text); a line of `.jsonl` or a row of `.parquet` is one. It costs one extra pass over a local file, for its
hash.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsae.store import NotFoundError, UsageError

from .hub import explain, one_line, pin, quiet

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


@dataclass(frozen=True)
class Dataset:
    """Provenance of a text.

    id: a builtin's name, a local file's name without its folder, or a Hub id. revision: the Hub commit.
    sha256: of the local file, or of a builtin's joined texts; None where the Hub's commit says it.
    """

    id: str
    revision: str | None
    split: str
    text_field: str
    sha256: str | None


def documents(
    dataset: str, revision: str | None = None, split: str = "train", text_field: str = "text"
) -> tuple[Dataset, Iterator[str]]:
    """Return a text's provenance and its documents in source order.

    dataset: `builtin:pydoc`, a local `.jsonl[.gz|.zst]`, `.txt` or `.parquet` file, or a Hub id
    (`owner/name`, or `owner/name:config`). Raises NotFoundError where there is no such text. It, or the first
    step of the iterator that meets it, raises UsageError for a missing field, a row that is no text, or a
    text without any.
    """
    if dataset.startswith("builtin:"):
        source, texts = _builtin(dataset)
    elif ending := next((e for e in FORMATS if dataset.endswith(e)), None):
        source, texts = _local(Path(dataset).expanduser(), ending, text_field)
    elif Path(dataset).expanduser().exists():
        raise UsageError(f"Text {dataset!r} is of no known format. Known are files in {', '.join(FORMATS)}.")
    else:
        source, texts = _hub(dataset, revision, split, text_field)
    return source, _not_empty(texts, source.id)


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


def _builtin(name: str) -> tuple[Dataset, Iterator[str]]:
    if name != PYDOC:
        raise NotFoundError(f"There is no text {name!r}. There is: {PYDOC}.")
    texts = pydoc()
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Dataset(PYDOC, None, "train", "text", digest), iter(texts)


def _local(path: Path, ending: str, text_field: str) -> tuple[Dataset, Iterator[str]]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise NotFoundError(f"There is no text {str(path)!r}.") from None
    except OSError as error:
        raise NotFoundError(f"Text {str(path)!r} cannot be read: {error.strerror}.") from None
    builder, options = FORMATS[ending]
    field = "text" if builder == "text" else text_field
    stream = _load(path.name, builder, data_files=str(path.resolve()), split="train", **options)
    return Dataset(path.name, None, "train", field, digest), _texts(stream, path.name, field)


def _hub(name: str, revision: str | None, split: str, text_field: str) -> tuple[Dataset, Iterator[str]]:
    repository, _, config = name.partition(":")
    commit = pin("dataset", repository, revision)
    stream = _load(name, repository, name=config or None, revision=commit, split=split)
    return Dataset(name, commit, split, text_field, None), _texts(stream, name, text_field)


def _load(dataset: str, builder: str, **options: Any) -> Any:
    """Return `datasets`' stream, or None for a file that has no rows at all."""
    with quiet():
        from datasets import load_dataset

        try:
            return load_dataset(builder, streaming=True, **options)
        except StopIteration:  # what the json builder raises for a file without a line
            return None
        except Exception as error:  # arrow's, the Hub's, the system's and its own types
            raise explain("dataset", dataset, error) from None


def _texts(stream: Any, name: str, field: str) -> Iterator[str]:
    batches = iter(()) if stream is None else stream.iter(batch_size=256)
    row = 0
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
        for value in batch[field]:
            if not isinstance(value, str):
                found = "nothing" if value is None else f"a value of type {type(value).__name__}"
                raise UsageError(f"Text {name!r}, row {row}: field {field!r} holds {found}; text is needed.")
            yield value
            row += 1


def _not_empty(texts: Iterator[str], name: str) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        raise UsageError(f"Text {name!r} is empty: it has no document with any text in it.")
