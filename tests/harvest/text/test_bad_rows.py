"""Rows that hold no text: refused with their place, or left out, counted and kept in the plan."""

import json
from pathlib import Path
from typing import Any

import pytest

from gsae.errors import UsageError
from gsae.harvest import BlockTokenised, HarvestConfig, Noted, documents, harvest, harvest_tokens
from gsae.store import describe, read_tokens
from gsae.tests.support.children import files

GOOD = [f"document {number} of many " * 5 for number in range(40)]


def jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if line in BROKEN else json.dumps({"text": line})) + "\n" for line in lines))
    return path


BROKEN = ['{"text": ', "not JSON", "[1]", '{"other": "x\\u0007"}', '"text"', '{"text": "\\ud800"}']


def config(model: Path, dataset: Path, **changed: Any) -> HarvestConfig:
    settings: dict[str, Any] = {"sites": ("mlp.1",), "context_size": 64, "window_rows": 1024, "threads": 1}
    return HarvestConfig(model=str(model), dataset=str(dataset), **(settings | changed))


@pytest.mark.parametrize("bad", [None, 5, ["a"], *BROKEN])
@pytest.mark.parametrize("seed", [None, 2])
def test_a_bad_row_is_refused_with_its_place_or_left_out(tmp_path: Path, bad: Any, seed: int | None) -> None:
    path = jsonl(tmp_path / "a.jsonl", [GOOD[0], bad, GOOD[1]])
    with pytest.raises(UsageError, match=r"Text 'a\.jsonl', row 1: .* With --bad-rows skip such rows are left out"):
        list(documents(str(path), shuffle_seed=seed).read())
    found = sorted(documents(str(path), shuffle_seed=seed, skip_bad=True).read(), key=lambda document: document.id)
    assert [(each.id, each.content) for each in found] == [(0, GOOD[0]), (1, ""), (2, GOOD[1])]
    assert [bool(each.bad) for each in found] == [False, True, False]
    assert str(found[1].bad).isprintable()


def test_bad_rows_of_a_csv_file_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,text\n1,one\n2\n3,three\n")
    found = list(documents(str(tmp_path / "a.csv"), skip_bad=True).read())
    assert [each.content for each in found] == ["one", "", "three"]
    assert found[1].bad == "Text 'a.csv', row 1: 1 values, where the first row has 2 names"


def test_a_text_of_bad_rows_alone_is_refused_with_the_first(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [None, None])
    with pytest.raises(UsageError, match=r"is empty: it has no document with any text in it\. Text 'a\.jsonl', row 0:"):
        list(documents(str(path), skip_bad=True).read())


@pytest.mark.slow
def test_the_plan_and_the_description_have_the_count_and_the_first_places(tiny_llama: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [None, *GOOD[:20], *BROKEN, *GOOD[20:]])
    asked = config(tiny_llama, path, bad_rows="skip", heldout=0.2, repeat=True, rows=3000)
    harvest_tokens(asked, tmp_path / "store")
    assert describe(tmp_path / "store")["bad_rows"]["count"] == 1 + len(BROKEN)
    store = harvest(asked, tmp_path / "store")
    assert store is not None
    assert store.plan.schema_version == "1.2"
    bad = store.plan.contexts.bad_rows
    assert bad is not None
    assert bad.count == 1 + len(BROKEN)
    assert [line.split(":")[0] for line in bad.first] == [f"Text 'a.jsonl', row {row}" for row in (0, 21, 22)]
    assert describe(tmp_path / "store")["bad_rows"] == bad.model_dump(mode="json")


@pytest.mark.slow
def test_a_refused_harvest_continues_with_skip_and_other_texts_keep_their_plan(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae.harvest.token_files.PART_TOKENS", 1)
    monkeypatch.setattr("gsae.harvest.text.packing.BLOCK_DOCUMENTS", 4)
    path = jsonl(tmp_path / "a.jsonl", [*GOOD[:3], None, *GOOD[3:30], "not JSON", *GOOD[30:]])
    harvest_tokens(config(tiny_llama, path, bad_rows="skip"), tmp_path / "direct")
    with pytest.raises(UsageError, match="row 3"):
        harvest_tokens(config(tiny_llama, path), tmp_path / "store")

    def stop(event: Any) -> None:
        if isinstance(event, BlockTokenised) and event.documents > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest_tokens(config(tiny_llama, path, bad_rows="skip"), tmp_path / "store", stop)
    assert list((tmp_path / "store").glob("tokens/*.npz"))
    harvest_tokens(config(tiny_llama, path, bad_rows="skip"), tmp_path / "store")
    assert files(tmp_path / "store") == files(tmp_path / "direct")
    made = read_tokens(tmp_path / "store")[1]
    assert made is not None
    assert made.contexts.bad_rows is not None
    assert made.contexts.bad_rows.count == 2
    good = jsonl(tmp_path / "a.jsonl", GOOD)
    for rows in ("skip", "refuse"):
        harvest_tokens(config(tiny_llama, good, bad_rows=rows), tmp_path / rows)
    assert files(tmp_path / "skip") == files(tmp_path / "refuse")


@pytest.mark.slow
@pytest.mark.parametrize("make", [harvest_tokens, harvest])
def test_a_harvest_without_held_out_rows_says_so_before_the_model_runs(
    tiny_llama: Path, tmp_path: Path, make: Any
) -> None:
    (tmp_path / "book.txt").write_text("a long book " * 500)
    for share, expected in ((0.1, 1), (0.0, 0)):
        events: list[Any] = []
        make(config(tiny_llama, tmp_path / "book.txt", heldout=share, seed=1), tmp_path / f"{share}", events.append)
        notes = [
            at for at, each in enumerate(events) if isinstance(each, Noted) and "No rows are held out" in each.text
        ]
        assert len(notes) == expected
        stages = [getattr(each, "name", "") for each in events]
        assert "loading the model" not in stages[: notes[0] if notes else 0]
