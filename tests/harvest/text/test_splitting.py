"""Long documents in parts: nothing is lost, the document stays the unit, and a long file is not held as a whole."""

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsae.errors import UsageError
from gsae.harvest import Document, HarvestConfig, documents, harvest
from gsae.harvest.text.splitting import split_documents

PARAGRAPHS = [f"Paragraph {number}. " + "Some words, a line.\nAnd another. " * (number % 7) for number in range(40)]
BOOK = "\n\n".join(PARAGRAPHS)


@given(st.text(alphabet="ab .\n", max_size=300), st.integers(1, 40))
def test_parts_by_length_are_the_text_and_never_longer(text: str, most: int) -> None:
    parts = [str(document.content) for document in split_documents(iter([Document(3, text)]), most)]
    assert "".join(parts) == text
    assert all(0 < len(part) <= most for part in parts) or not text
    assert len(parts) == 1 or all(most // 2 < len(part) or most < 2 for part in parts[:-1])


def test_parts_end_at_paragraphs_where_they_can() -> None:
    parts = [str(document.content) for document in split_documents(iter([Document(0, BOOK)]), 1000)]
    assert all(part.endswith("\n\n") for part in parts[:-1])


def test_blank_lines_cut_a_document_and_are_lost() -> None:
    text = "\n\n" + BOOK.replace("\n\n", "\n \t\n\n") + "\n\n"
    found = list(split_documents(iter([Document(2, text), Document(5, "one\ntwo\n")]), "blank-lines"))
    name = hashlib.sha256(text.encode()).hexdigest()
    assert found[:-1] == [Document(2, part, part_of=name) for part in PARAGRAPHS]
    assert found[-1] == Document(5, "one\ntwo\n")


@pytest.mark.parametrize("split", ["blank-lines", 500])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_file_is_cut_the_same_way_in_each_format(tmp_path: Path, name: str, split: Any) -> None:
    data = json.dumps({"text": BOOK}).encode() if name == "a.jsonl" else BOOK.replace("\n", "\r\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    text = documents(str(tmp_path / name), split_into=split)
    found = list(text.read())
    assert [each.content for each in found] == [
        each.content for each in split_documents(iter([Document(0, BOOK)]), split)
    ]
    assert {each.id for each in found} == {0}
    assert len({each.part_of for each in found}) == 1
    assert found[0].part_of is not None
    assert text.source.model_dump()["split_documents"] == split
    assert text.source.schema_version == "1.2"
    assert list(documents(str(tmp_path / name), split_into=split, skip=2, maximum=3).read()) == found[2:5]


def test_a_long_txt_file_is_not_held_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text((BOOK + "\n\n") * 2000)
    text = documents(str(path), split_into=8000)
    tracemalloc.start()
    count = sum(1 for _ in text.read())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 1000
    assert peak < 4 << 20 < path.stat().st_size


def test_token_ids_are_not_cut() -> None:
    with pytest.raises(UsageError, match="split_documents: needs text"):
        HarvestConfig(model="m", dataset="a.jsonl", sites=("mlp.1",), token_field="ids", split_documents=5)
    with pytest.raises(UsageError, match="split_documents: got 'lines'"):
        HarvestConfig(model="m", dataset="a.jsonl", sites=("mlp.1",), split_documents="lines")


@pytest.mark.slow
def test_parts_of_a_document_are_on_one_side_and_count_as_one(tiny_llama: Path, tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.txt").write_text(f"Book {number}. {BOOK}")
    asked = HarvestConfig(
        model=str(tiny_llama), dataset=str(tmp_path), sites=("mlp.1",), context_size=64, window_rows=1 << 14,
        threads=1, heldout=0.4, split_documents=700,
    )  # fmt: skip
    store = harvest(asked, tmp_path / "store")
    assert store is not None
    found = store.documents()
    assert len(found["id"]) > 80
    sides = {number: set(found["split"][found["id"] == number].tolist()) for number in np.unique(found["id"]).tolist()}
    assert len(sides) == 12
    assert sorted(map(tuple, sides.values()))[0] == (0,)
    assert all(len(side) == 1 for side in sides.values())
    assert {0, 1} == set.union(*sides.values())
