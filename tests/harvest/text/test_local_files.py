"""Texts of one or many local files: each format and compression gives the same documents, in sorted order."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from gsae.errors import GsaeError, NotFoundError, UsageError
from gsae.harvest import Document, documents

TEXTS = ['One.\n\nTwo, "quoted".', "Ünïcode — ‘quotes’ \U0001f600", "<|im_start|> is text", "2020-01-01", "last"]
ROWS = [{"n": number, "text": text, "meta": {"a": [number]}} for number, text in enumerate(TEXTS)]


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[Any], separator: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator)
    writer.writerow(["n", "text"])
    writer.writerows([row["n"], row["text"]] for row in rows)
    return text.getvalue().encode()


def as_parquet(rows: list[Any]) -> bytes:
    from pyarrow import Table, parquet

    data = io.BytesIO()
    parquet.write_table(Table.from_pylist(rows), data, row_group_size=2)
    return data.getvalue()


def as_arrow(rows: list[Any], streamed: bool = True) -> bytes:
    import pyarrow

    table, data = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with (pyarrow.ipc.new_stream if streamed else pyarrow.ipc.new_file)(data, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return data.getvalue()


FORMATS: dict[str, Callable[[list[Any]], bytes]] = {
    "a.jsonl": as_lines,
    "a.ndjson": as_lines,
    "lines.json": as_lines,
    "array.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "bom.json": lambda rows: b"\xef\xbb\xbf \n" + json.dumps(rows).encode(),
    "a.csv": as_csv,
    "a.tsv": lambda rows: as_csv(rows, "\t"),
    "a.parquet": as_parquet,
    "stream.arrow": as_arrow,
    "file.arrow": lambda rows: as_arrow(rows, streamed=False),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def contents(path: Path | str, **settings: Any) -> list[Any]:
    return [document.content for document in documents(str(path), **settings).read()]


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, FORMATS[name](ROWS))
    text = documents(str(path))
    assert list(text.read()) == list(text.read()) == list(map(Document, range(len(TEXTS)), TEXTS))
    assert text.source.model_dump() == {
        "id": name,
        "revision": None,
        "split": "train",
        "text_field": "text",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv", "a.txt"])
def test_compressed_files_are_read_to_their_end_and_a_cut_one_is_refused(
    tmp_path: Path, name: str, compression: str
) -> None:
    data = FORMATS[name](ROWS) if name in FORMATS else "\n\n".join(TEXTS).encode()
    half, compress = len(data) // 2, COMPRESSIONS[compression]
    packed = compress(data[:half]) + compress(data[half:])  # as parallel compressors write it
    path = written(tmp_path / (name + compression), packed)
    assert contents(path) == (TEXTS if name in FORMATS else ["\n\n".join(TEXTS)])
    path.write_bytes(packed[:-9])
    with pytest.raises(UsageError, match="cannot be read") as caught:
        contents(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet", "a.arrow"])
def test_token_ids_are_read_from_each_format_that_can_hold_them(tmp_path: Path, name: str) -> None:
    ids = [[5, 6, 7], [8], [4, 1023]]
    rows = [{"ids": each, "n": 1} for each in ids]
    data = as_arrow(rows) if name == "a.arrow" else FORMATS[name](rows)
    path = written(tmp_path / name, data)
    for seed in (None, 1):
        found = list(documents(str(path), field="ids", tokenised=True, shuffle_seed=seed).read())
        assert [found[at].content.tolist() for at in sorted(range(3), key=lambda at: found[at].id)] == ids  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet", "stream.arrow"])
def test_a_field_that_is_not_asked_for_may_have_any_type_late_in_the_file(tmp_path: Path, name: str) -> None:
    """datasets #7322: the type of an unused field changes after megabytes."""
    rows: list[Any] = [{"text": f"row {i}", "meta": i, "pad": "x" * 4000} for i in range(3000)]
    if name in ("a.jsonl", "array.json"):
        rows.append({"text": "last", "meta": {"late": "type"}, "pad": None})
    assert contents(written(tmp_path / name, FORMATS[name](rows))) == [row["text"] for row in rows]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    written(folder / "b.jsonl", as_lines(ROWS[3:]))
    written(folder / "a.jsonl.gz", gzip.compress(as_lines(ROWS[:2])))
    written(folder / "a/z.jsonl", as_lines(ROWS[2:3]))
    written(folder / "README.md", b"not text")
    written(folder / ".hidden/x.jsonl", b"not text")
    written(folder / "dataset_infos.json", b"{}")
    return folder


@pytest.mark.parametrize("pattern", ["", "/", "/**/*.jsonl*"])
def test_a_folder_or_glob_is_read_in_sorted_order_with_the_hash_of_each_file(shards: Path, pattern: str) -> None:
    text = documents(str(shards) + pattern)
    names = ["a.jsonl.gz", "a/z.jsonl", "b.jsonl"]
    in_order = [TEXTS[i] for i in (0, 1, 2, 3, 4)]
    assert list(text.read()) == list(map(Document, range(5), in_order))
    hashes = {name: hashlib.sha256((shards / name).read_bytes()).hexdigest() for name in names}
    listed = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    assert text.source.files == hashes
    assert text.source.sha256 == hashlib.sha256(listed.encode()).hexdigest()
    assert text.source.id == "shards" + pattern.rstrip("/")
    assert text.source.schema_version == "1.2"


def test_a_glob_takes_the_files_that_match_and_their_order_is_sorted(shards: Path) -> None:
    assert contents(shards / "*.jsonl") == TEXTS[3:]
    assert documents(str(shards / "[ab].jsonl")).source.id == "shards/[ab].jsonl"


def test_several_files_are_shuffled_as_one_text(shards: Path) -> None:
    found = list(documents(str(shards), shuffle_seed=3).read())
    assert sorted(found, key=lambda document: document.id) == list(map(Document, range(5), TEXTS))
    assert [document.id for document in found] != list(range(5))


def test_a_folder_of_txt_files_is_a_document_a_file_and_is_shuffled_by_files(tmp_path: Path) -> None:
    for number in range(30):
        written(tmp_path / f"books/{number:02d}.txt", f"book {number}\r\n".encode())
    expected = [Document(number, f"book {number}\n") for number in range(30)]
    assert list(documents(str(tmp_path / "books")).read()) == expected
    mixed = list(documents(str(tmp_path / "books"), shuffle_seed=0).read())
    assert mixed != expected
    assert sorted(mixed) == expected


def test_files_named_after_splits_are_chosen_by_the_split(tmp_path: Path) -> None:
    written(tmp_path / "d/data/train-00000-of-00002.parquet", as_parquet(ROWS[:1]))
    written(tmp_path / "d/data/train-00001-of-00002.parquet", as_parquet(ROWS[1:2]))
    written(tmp_path / "d/data/validation-00000-of-00001.parquet", as_parquet(ROWS[2:3]))
    assert contents(tmp_path / "d") == TEXTS[:2]
    assert contents(tmp_path / "d", split="validation") == TEXTS[2:3]
    assert documents(str(tmp_path / "d"), split="validation").source.split == "validation"
    with pytest.raises(NotFoundError, match=r"has no split 'test'\. It has: train, validation\."):
        documents(str(tmp_path / "d"), split="test")
    written(tmp_path / "d/other.parquet", as_parquet(ROWS))
    with pytest.raises(UsageError, match=r"and others, such as other\.parquet\. Name the wanted files by a glob\."):
        documents(str(tmp_path / "d"))


def test_what_save_to_disk_wrote_is_read_with_its_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    whole = Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    text = documents(str(tmp_path / "saved"))
    assert list(text.read()) == list(map(Document, range(len(TEXTS)), TEXTS))
    assert list(text.source.files) == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    DatasetDict({"train": whole, "late": whole.select([4])}).save_to_disk(str(tmp_path / "splits"))
    assert contents(tmp_path / "splits") == TEXTS
    assert contents(tmp_path / "splits", split="late") == ["last"]
    with pytest.raises(NotFoundError, match=r"has no split 'test'\. It has: train, late\."):
        documents(str(tmp_path / "splits"), split="test")


def test_a_thousand_files_are_opened_one_at_a_time(tmp_path: Path) -> None:
    for number in range(1000):
        written(tmp_path / f"many/{number:04d}.jsonl", as_lines([{"text": f"file {number}"}]))
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    most = 0
    for number, document in enumerate(documents(str(tmp_path / "many")).read()):
        assert document.content == f"file {number}"
        most = max(most, len(list(Path("/proc/self/fd").iterdir())) - open_files)
    assert most <= 2


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, FORMATS[name]([{"n": i, "text": "x" * 10_000} for i in range(3000)]))
    text = documents(str(path))
    tracemalloc.start()
    assert sum(1 for _ in text.read()) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20 < path.stat().st_size


@pytest.mark.parametrize(
    ("name", "data", "kind", "said"),
    [
        ("a.parquet", as_parquet([{"body": "a"}]), UsageError, r"cannot be read: no field 'text'\. It has: body\."),
        ("a.arrow", as_arrow([{"body": "a"}]), UsageError, r"cannot be read: no field 'text'\. It has: body\."),
        ("a.csv", b"body,n\na,1\n", UsageError, r"cannot be read: no field 'text'\. It has: body, n\."),
        ("a.csv", b"n,text\n1,a\n2\n", UsageError, "row 1: 1 values, where the first row has 2 names"),
        ("a.csv", b'n,text\n1,"a\n', UsageError, r"'a\.csv' cannot be read"),
        ("a.csv", b"text\n\xff\n", UsageError, r"'a\.csv' is not UTF-8"),
        ("a.csv", b"", UsageError, r"'a\.csv' is empty"),
        ("a.parquet", b"PAR1 not", UsageError, r"'a\.parquet' cannot be read"),
        ("a.arrow", b"ARROW1 not", UsageError, r"'a\.arrow' cannot be read"),
        (
            "a.json",
            b'[{"text": "a"}, {"text" "b"}, {"text": "c and more"}]',
            UsageError,
            "after row 0: the next element",
        ),
        ("a.json", b'[{"text": "a"}, ', UsageError, "after row 0: the array has no end"),
        ("a.json", b'{"data": [{"text": "a"}]}', UsageError, r"row 0: no field 'text'\. It has: data\."),
        ("a.jsonl", b'{"text": "\\ud800"}', UsageError, "half of a surrogate pair"),
        ("a.jsonl", b'"text"', UsageError, "row 0: not a JSON object, but a value of type str"),
        ("a.parquet.gz", b"", UsageError, "has no known format"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, name: str, data: bytes, kind: type[GsaeError], said: str
) -> None:
    path = written(tmp_path / name, data)
    with pytest.raises(kind, match=said) as caught:
        contents(path)
    assert "\n" not in str(caught.value)


def test_a_folder_or_glob_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no file of text"):
        documents(str(tmp_path))
    with pytest.raises(NotFoundError, match=r"There is no text '.*\*\.jsonl': no file matches it\."):
        documents(str(tmp_path / "*.jsonl"))
    written(tmp_path / "a.jsonl", as_lines(ROWS))
    written(tmp_path / "b.csv", as_csv(ROWS))
    with pytest.raises(UsageError, match=r"has files of several formats, such as (a\.jsonl and b\.csv|b\.csv and a)"):
        documents(str(tmp_path))


def test_each_row_is_named_with_its_file(shards: Path) -> None:
    written(shards / "a/z.jsonl", as_lines([ROWS[2], {"text": None}]))
    with pytest.raises(UsageError, match=r"Text 'a/z\.jsonl', row 1: field 'text' holds nothing"):
        contents(shards)
