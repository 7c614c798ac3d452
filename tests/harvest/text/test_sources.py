"""Documents: the same text in every format, its provenance, and one clear error for each wrong text."""

import gzip
import hashlib
import json
import re
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import zstandard

from gsae.errors import GsaeError, NotFoundError, UsageError
from gsae.harvest import Document, Text, TextRequest, documents
from gsae.harvest.text.sources import SOURCES
from gsae.store import DatasetSource

TEXTS = ["One.\n\nTwo.", "", "Ünïcode — ‘quotes’ \U0001f600", "<|im_start|> is text", "last"]


def contents(text: Text) -> list[Any]:
    return [document.content for document in text.read()]


def written(folder: Path, name: str) -> Path:
    path = folder / name
    lines = "\n".join(json.dumps({"n": i, "text": text}) for i, text in enumerate(TEXTS))
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(TEXTS)), "text": TEXTS}), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines.encode()))
    else:
        path.write_text(lines, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_local_file_gives_its_rows_in_order_and_its_hash(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name)
    text = documents(str(path))
    source = text.source
    assert list(text.read()) == list(text.read()) == list(map(Document, range(len(TEXTS)), TEXTS))
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source.id, source.revision, source.split, source.text_field) == (name, None, "train", "text")


def test_a_txt_file_is_one_document_with_its_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n\n".join(TEXTS), encoding="utf-8")
    assert contents(documents(str(path))) == ["\n\n\n".join(TEXTS)]


def test_a_long_jsonl_keeps_its_order_across_batches(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"body": f"row {i}"}) for i in range(1000)))
    assert contents(documents(str(path), field="body")) == [f"row {i}" for i in range(1000)]


def test_pydoc_is_the_same_each_time_and_its_hash_identifies_it() -> None:
    first, second = documents("builtin:pydoc"), documents("builtin:pydoc")
    texts = contents(first)
    assert texts == contents(second)
    assert first.source == second.source
    named = "\0".join(f"{document.part_of}\0{document.content}" for document in first.read())
    assert first.source.sha256 == hashlib.sha256(named.encode()).hexdigest()


def test_parts_of_a_topic_of_pydoc_have_its_number_and_its_name() -> None:
    read = list(documents("builtin:pydoc").read())
    assert {(document.id, document.part_of) for document in read} <= set(enumerate(sorted(topics)))
    numbers = [document.id for document in read]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) < len(numbers)
    assert all(len(str(part.content)) < 8000 for part in read if "\n\n" in str(part.content))


def test_pydoc_has_no_long_paragraph_twice_and_loses_none() -> None:
    def paragraphs(text: str) -> list[str]:
        return [p for p in (" ".join(p.split()) for p in re.split(r"\n\s*\n", text)) if len(p) > 20]

    kept = [p for text in contents(documents("builtin:pydoc")) for p in paragraphs(text)]
    source = [p for text in topics.values() for p in paragraphs(text)]
    assert len(kept) == len(set(kept)) < len(source)
    assert set(kept) == set(source)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"body": "a", "n": 1}\n', r"'a\.jsonl', row 0: no field 'text'\. It has: body, n\."),
        (
            '{"text": "a"}\n{"text": null}\n',
            r"'a\.jsonl', row 1: field 'text' holds nothing; text is needed \(for token ids: --token-field\)\.",
        ),
        ('{"text": 1}\n', r"'a\.jsonl', row 0: field 'text' holds a value of type int; text is needed "),
        ('{"text": "a"}\n{"text": \n', r"'a\.jsonl', row 1: not JSON"),
        ("", r"'a\.jsonl' is empty"),
        ('{"text": ""}\n{"text": "  "}\n', r"'a\.jsonl' is empty: it has no document with any text in it\."),
    ],
)
def test_a_jsonl_file_without_text_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=said) as caught:
        contents(documents(str(path)))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\xfa text"])
def test_a_txt_file_without_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"'a\.txt' is (empty|not UTF-8)"):
        contents(documents(str(path)))


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        (
            "builtin:nothing",
            NotFoundError,
            r"no text 'builtin:nothing'\. A text is one of: builtin:pydoc; a local file in \.jsonl, ",
        ),
        ("/nowhere/a.jsonl", NotFoundError, r"There is no text '/nowhere/a\.jsonl'\."),
        (__file__, UsageError, r"has no known format\. Known are: \.jsonl, "),
        ("/nowhere/at/all", NotFoundError, r"There is no dataset '/nowhere/at/all'"),
    ],
)
def test_a_text_that_does_not_exist_is_refused_in_one_line(name: str, kind: type[GsaeError], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        documents(name)
    assert "\n" not in str(caught.value)


class Numbers:
    """A text source as a contributor would write it: documents that count up to the number in their name."""

    FORM = "numbers:COUNT"

    def serves(self, dataset: str) -> bool:
        return dataset.startswith("numbers:")

    def open_text(self, request: TextRequest) -> Text:
        count = int(request.dataset.removeprefix("numbers:"))
        digest = hashlib.sha256(request.dataset.encode()).hexdigest()
        source = DatasetSource(id=request.dataset, revision=None, split="train", text_field="text", sha256=digest)
        return Text(source, lambda: (Document(number, f"number {number}") for number in range(count)))


def test_a_new_source_needs_one_entry_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gsae.harvest.text.sources.SOURCES", (Numbers(), *SOURCES))
    text = documents("numbers:5", skip=1, maximum=3, repeat=True)
    assert [(d.id, d.content, d.again) for d in islice(text.read(), 4)] == [
        (1, "number 1", False),
        (2, "number 2", False),
        (3, "number 3", False),
        (1, "number 1", True),
    ]
    assert (text.source.id, text.source.skip_documents, text.source.repeat) == ("numbers:5", 1, True)
    assert documents("builtin:pydoc").source.id == "builtin:pydoc"
    with pytest.raises(NotFoundError, match=r"A text is one of: numbers:COUNT; builtin:pydoc; "):
        documents("builtin:nothing")
