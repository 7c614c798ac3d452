"""Several texts as one: interleaved by documents and weights, the same way each time."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gsae.errors import IncompatibleError, UsageError
from gsae.harvest import HarvestConfig, Worker, documents, harvest, harvest_tokens
from gsae.store import copy, describe, open_store, seal, verify
from gsae.tests.support.children import files


def written(path: Path, count: int, name: str) -> str:
    path.write_text("".join(json.dumps({"text": f"{name}{number} " * 12}) + "\n" for number in range(count)))
    return str(path)


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    return written(tmp_path / "a.jsonl", 30, "a"), written(tmp_path / "b.jsonl", 6, "b")


def order(names: Any, **settings: Any) -> str:
    return "".join(str(document.content)[0] for document in documents(names, **settings).read())


def test_documents_are_interleaved_by_weights_and_numbered_apart(two: tuple[str, str]) -> None:
    assert order(two, weights=(3, 1)) == "aaab" * 6 + "a" * 12
    assert order(two) == "ab" * 6 + "a" * 24
    assert order(two, weights=(1.5, 0.5), maximum=8) == "aaabaaab"
    text = documents(two, weights=(3, 1))
    found = list(text.read())
    assert found == list(text.read())
    assert all(str(each.content).startswith(f"{'ab'[each.id % 2]}{each.id // 2} ") for each in found)
    assert len({each.id for each in found}) == 36


def test_the_plan_names_each_text_and_its_weight(two: tuple[str, str]) -> None:
    source = documents(two, weights=(3, 1)).source
    assert source.mixed == tuple(documents(each).source for each in two)
    assert (source.id, source.weights, source.schema_version) == ("a.jsonl + b.jsonl", (3.0, 1.0), "1.2")
    others = [documents(two).source, documents(two[::-1], weights=(1, 3)).source]
    assert len({source.sha256, *(other.sha256 for other in others)}) == 3


def test_a_document_in_parts_is_taken_as_one(two: tuple[str, str], tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"c{number}.txt").write_text("\n\n".join(["c"] * 3))
    assert order([two[1], str(tmp_path / "c*.txt")], split_into="blank-lines") == "bcccbcccbbbb"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": (1, 2, 3)}, "weights: got 3; needs one for each of 2 datasets"),
        ({"weights": "3,x"}, "weights"),
        ({"weights": (1, 0)}, "weights.1"),
        ({"dataset_revision": "main"}, "dataset_revision: cannot be used with several datasets"),
    ],
)
def test_settings_that_do_not_fit_several_texts_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        HarvestConfig(model="m", dataset=("a.jsonl", "b.jsonl"), sites=("mlp.1",), **settings)


def test_a_text_without_documents_is_named(two: tuple[str, str], tmp_path: Path) -> None:
    empty = written(tmp_path / "empty.jsonl", 0, "")
    with pytest.raises(UsageError, match=r"Text 'empty\.jsonl' is empty"):
        order([two[0], empty])


@pytest.mark.slow
def test_a_mixed_harvest_repeats_its_bytes_without_its_texts(
    tiny_llama: Path, two: tuple[str, str], tmp_path: Path
) -> None:
    def config(weights: Any) -> HarvestConfig:
        return HarvestConfig(
            model=str(tiny_llama), dataset=two, weights=weights, sites=("mlp.1",), context_size=64, window_rows=1024,
            threads=1, repeat=True, rows=4000, heldout=0.2,
        )  # fmt: skip

    harvest_tokens(config("3,1"), tmp_path / "store")
    harvest(config(("3,1",)), tmp_path / "direct")
    for path in two:
        shutil.move(path, f"{path}.moved")
    store = harvest(config((3, 1)), tmp_path / "store")
    assert store is not None
    assert files(tmp_path / "store") == files(tmp_path / "direct")
    with pytest.raises(IncompatibleError, match=r"dataset\.weights was \[3\.0, 1\.0\], now \[1\.0, 1\.0\]"):
        harvest(config(()), tmp_path / "store")


@pytest.mark.slow
def test_a_store_of_mixed_texts_with_bad_rows_survives_workers_copies_and_seals(
    tiny_llama: Path, two: tuple[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder / "x.jsonl", 40, "x")
    (folder / "y.jsonl").write_text('not JSON\n{"text": "a long y. b long y. "}\n')
    asked = HarvestConfig(
        model=str(tiny_llama), dataset=(two[0], str(folder)), weights=(1, 2), sites=("mlp.1",), context_size=64,
        window_rows=256, threads=1, heldout=0.2, bad_rows="skip", split_documents=90,
    )  # fmt: skip
    whole = harvest(asked, tmp_path / "whole")
    assert whole is not None
    for rank in (1, 0, 1):
        shared = harvest(asked, tmp_path / "shared", worker=Worker(rank, 2))
    assert shared is not None
    assert files(tmp_path / "shared") == files(tmp_path / "whole")
    assert copy(tmp_path / "whole", tmp_path / "copied", codec="zstd") == whole.digest
    copied = open_store(tmp_path / "copied")
    assert verify(copied, deep=True) == []
    assert copied.plan.dataset == whole.plan.dataset
    assert copied.plan.contexts.bad_rows is not None
    last = sorted((tmp_path / "shared/shards").glob("train-*"))[-1]
    for path in (last, tmp_path / "shared/manifest.json"):
        path.unlink()
    sealed = seal(tmp_path / "shared")
    assert verify(sealed, deep=True) == []
    assert describe(tmp_path / "shared")["bad_rows"]["count"] == 1
