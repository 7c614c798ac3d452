"""Rows with a NaN or an infinity: the harvest stops, or says how many it stored."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.errors import UsageError
from gsae.harvest import HarvestConfig, Noted, Worker, harvest
from gsae.store import SPLITS, describe, nonfinite_rows, open_store, verify
from gsae.tests.support.changed_llama import changed_llama, overflowing
from gsae.tests.support.children import files
from gsae.tests.support.command import gsae, refused

RARE = "é"


def config(model: Path, dataset: Path | str = "builtin:pydoc", **changed: Any) -> HarvestConfig:
    settings: dict[str, Any] = {"sites": ("resid.0", "resid.1"), "rows": 3000, "context_size": 64, "heldout": 0.1}
    settings |= {"window_rows": 512, "batch_size": 8, "dtype": "float16"}
    return HarvestConfig(model=str(model), dataset=str(dataset), **(settings | changed))


@pytest.fixture(scope="module")
def overflows(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Llama with a layer 1 that overflows in float16, and not in bfloat16."""
    return changed_llama(tiny_llama, tmp_path_factory.mktemp("models") / "overflows", overflowing(1))


@pytest.fixture(scope="module")
def rarely(tiny_llama: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with one token, in RARE alone, that overflows as soon as its embedding is float16."""
    token = tiny_tokenizer(RARE)["input_ids"][-1]

    def change(model: Any) -> None:
        model.model.embed_tokens.weight.data[token] = 1e5

    return changed_llama(tiny_llama, tmp_path_factory.mktemp("models") / "rarely", change)


def text(folder: Path, rare: dict[int, int]) -> Path:
    """300 documents of 40 words; those numbered in `rare` have RARE as many times."""
    path = folder / "text.jsonl"
    lines = [f"{i} the expression " * 13 + RARE * rare.get(i, 0) for i in range(300)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


EMBED = {"sites": ("module:model.embed_tokens:out",), "window_rows": 2048, "rows": None, "heldout": 0.0}


def test_a_model_that_overflows_stops_before_its_first_window_is_published(overflows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        harvest(config(overflows), tmp_path / "store")
    assert "\n" not in str(raised.value)
    said = re.match(
        r"Window heldout-00000 has rows with a NaN or an infinity: resid\.1 (\d+) of 512 \((\d+\.\d) %\)\. The ",
        str(raised.value),
    )
    assert said is not None
    assert int(said[1]) > 256
    assert float(said[2]) == pytest.approx(100 * int(said[1]) / 512, abs=0.1)
    assert "another --dtype" in str(raised.value)
    assert "--allow-nonfinite" in str(raised.value)
    assert not [name for name in files(tmp_path / "store") if name.startswith(("train/", "records/")) and "/c/" in name]


def test_a_resume_may_allow_it_and_everyone_says_how_many_there_are(overflows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        harvest(config(overflows), tmp_path / "store")
    plan = (tmp_path / "store/plan.json").read_bytes()
    events: list[Any] = []
    store = harvest(config(overflows, allow_nonfinite=True), tmp_path / "store", events.append)
    assert store is not None
    assert (tmp_path / "store/plan.json").read_bytes() == plan
    counted = {
        split: sum(int((~rows.isfinite().all(1)).sum()) for _, rows in store.site("resid.1", split).in_order())
        for split in SPLITS
    }
    assert nonfinite_rows(store) == {"resid.1": counted}
    assert counted["train"] > 1500
    assert describe(store.path)["nonfinite_rows"] == nonfinite_rows(store)
    notes = [event.text for event in events if isinstance(event, Noted)]
    assert len(notes) == 2
    assert "Window heldout-00000" in notes[0]
    total = f"resid.1 {sum(counted.values()):,} of "
    assert total in notes[1]
    assert verify(store, deep=True) == []
    known = gsae("verify", store.path, "--json")
    assert json.loads(known.stdout)["nonfinite_rows"] == nonfinite_rows(store)
    assert total in known.stderr
    assert "nonfinite_rows:" in gsae("info", store.path).stdout


@pytest.mark.slow
def test_the_setting_changes_no_byte(tiny_llama: Path, tmp_path: Path) -> None:
    for name, allowed in (("a", False), ("b", True)):
        harvest(config(tiny_llama, dtype="bfloat16", allow_nonfinite=allowed), tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert "nonfinite_rows" not in describe(tmp_path / "a")
    assert "NaN" not in gsae("verify", tmp_path / "a").stderr


@pytest.mark.slow
def test_the_same_model_is_harvested_in_bfloat16(overflows: Path, tmp_path: Path) -> None:
    store = harvest(config(overflows, dtype="bfloat16"), tmp_path / "store")
    assert nonfinite_rows(store) == {}


def test_a_site_that_cannot_be_confirmed_because_of_it_says_so(overflows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Layer 1 of LlamaForCausalLM gives a NaN or an infinity in float16"):
        harvest(config(overflows, sites=("mlp.2",)), tmp_path / "store")
    assert not (tmp_path / "store/plan.json").exists()


def test_one_such_row_in_the_first_window_stops(rarely: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train-00000 .*embed_tokens:out 1 of \d\d,\d\d\d \(0\.\d+ %\)"):
        harvest(config(rarely, text(tmp_path, {250: 1}), **EMBED | {"window_rows": 1 << 17}), tmp_path / "store")


def test_a_rare_one_in_a_later_window_is_stored_and_said(rarely: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    store = harvest(config(rarely, text(tmp_path, {250: 1}), **EMBED), tmp_path / "store", events.append)
    assert store is not None
    notes = [event.text for event in events if isinstance(event, Noted)]
    assert nonfinite_rows(store) == {EMBED["sites"][0]: {"train": 1, "heldout": 0}}
    assert len(notes) == 2
    assert "Window train-0000" in notes[0]
    assert str(store.path) in notes[1]
    bad = [rows for _, rows in store.site(EMBED["sites"][0]).in_order()]
    assert int((~torch.isfinite(torch.cat(bad)).all(1)).sum()) == 1


def test_many_in_a_later_window_stop_and_what_was_made_before_stays(rarely: Path, tmp_path: Path) -> None:
    asked = config(rarely, text(tmp_path, {250: 5}), **EMBED)
    with pytest.raises(UsageError, match=r"Window train-0000[1-9] has .* 5 of "):
        harvest(asked, tmp_path / "store")
    before = {name: data for name, data in files(tmp_path / "store").items() if name.startswith("shards/")}
    allowed = asked.model_copy(update={"allow_nonfinite": True})
    store = harvest(allowed, tmp_path / "store")
    assert before
    assert before.items() <= files(store.path).items()
    assert verify(store, deep=True) == []


@pytest.mark.slow
def test_a_worker_reports_its_own_share(overflows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gsae.harvest.pipeline.PATIENCE_SECONDS", 0.0)
    for allowed in (False, True):
        events: list[Any] = []
        asked = config(overflows, allow_nonfinite=allowed)
        if not allowed:
            with pytest.raises(UsageError, match="Window heldout-00001 has"):
                harvest(asked, tmp_path / "store", worker=Worker(1, 2))
            continue
        assert harvest(asked, tmp_path / "store", events.append, worker=Worker(1, 2)) is None
        notes = [event.text for event in events if isinstance(event, Noted)]
        assert notes[-1].startswith("The windows of this call have rows with a NaN or an infinity: resid.1 ")


def test_a_dry_run_measures_it(overflows: Path, tmp_path: Path) -> None:
    asked = ["harvest", "--model", overflows, "--dataset", "builtin:pydoc", "--site", "resid.1", "--context-size", 64]
    asked += ["--dtype", "float16", "--rows", 3000, "--dry-run", "--json", "--out", tmp_path / "store"]
    refused(2, "A short run over the text has rows with a NaN or an infinity: resid.1", *asked)
    found = json.loads(gsae(*asked, "--allow-nonfinite").stdout)
    assert found["nonfinite_rows"]["resid.1"] > 0
    assert json.loads(gsae(*asked, "--no-probe").stdout)["nonfinite_rows"] is None


def test_a_store_of_an_older_version_that_has_some_stays_readable(overflows: Path, tmp_path: Path) -> None:
    """The store of an older version is what the setting gives: no file has another byte."""
    store = harvest(config(overflows, allow_nonfinite=True), tmp_path / "store")
    assert len(open_store(store.path).site("resid.1")[:5]) == 5
