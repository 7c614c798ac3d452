"""The estimate of `--dry-run`, and the refusal of a harvest that the disk has no room for."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from gsae.commands.harvest import rate
from gsae.errors import SpaceError
from gsae.harvest import BatchDone, HarvestConfig, estimate_harvest, harvest, make_request, probe, weights_are_local
from gsae.store import open_store
from gsae.tests.support.children import files
from gsae.tests.support.command import gsae, refused

pytestmark = pytest.mark.slow


def config(model: Path, **changed: Any) -> HarvestConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "dataset": "builtin:pydoc",
        "sites": ("mlp.1", "resid.0"),
        "rows": 20000,
        "context_size": 64,
        "heldout": 0.1,
        "window_rows": 4096,
    }
    return HarvestConfig(**(settings | changed))


def free(monkeypatch: pytest.MonkeyPatch, bytes_: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, bytes_))


def test_an_estimate_from_a_probe_agrees_with_the_store(tiny_llama: Path, tmp_path: Path) -> None:
    asked = config(tiny_llama)
    found = probe(make_request(asked))
    told = estimate_harvest(make_request(asked), tmp_path / "store", found)
    store = harvest(asked, tmp_path / "store")
    assert store is not None
    assert told["rows"] == store.plan.rows
    assert told["batch_size"] == store.plan.batch_size
    # The text is one block of documents, so more is held out here than was asked for: figures are compared a row.
    foretold, there = told["rows"] + told["heldout_rows"], store.plan.rows + store.plan.heldout_rows
    assert told["windows"] == 5 + 1
    assert told["contexts"] / foretold == pytest.approx(store.plan.contexts.contexts / there, rel=0.1)
    assert told["disk_bytes"] / foretold == pytest.approx(store.bytes / there, rel=0.15)
    assert told["raw_bytes"] == foretold * 128
    for name, ratio in told["ratio"].items():
        site = store.site(name)
        size = sum(store.file_sizes(store.array(site.spec, "train"), "train"))
        assert ratio == pytest.approx(size / site.raw_bytes, rel=0.1)
    assert told["seconds"] == pytest.approx(told["contexts"] * 64 / told["tokens_per_second"])
    assert told["memory_bytes"] > told["model_bytes"] + told["window_memory_bytes"] > told["window_memory_bytes"]


@pytest.mark.parametrize(
    "codec", [{"codec": "zstd"}, {"codec": "none"}, {"level": 0}, {"dtype": "float16", "codec": "zstd"}]
)
def test_an_estimate_says_whether_its_ratio_is_measured_or_typical(
    tiny_llama: Path, tmp_path: Path, codec: dict[str, Any]
) -> None:
    told = estimate_harvest(make_request(config(tiny_llama, **codec)), tmp_path)
    assert told["ratio_is"].startswith("typical of ")
    assert told["seconds"] is None
    assert told["tokens_per_second"] is None
    assert 0.7 < told["ratio"] <= 1
    measured = estimate_harvest(
        make_request(config(tiny_llama, **codec)), tmp_path, probe(make_request(config(tiny_llama, **codec)))
    )
    assert measured["ratio_is"].startswith("measured on ")


def test_what_follows_from_rows_is_unknown_without_them(tiny_llama: Path, tmp_path: Path) -> None:
    told = estimate_harvest(make_request(config(tiny_llama, rows=None)), tmp_path)
    assert {name for name, value in told.items() if value is None} >= {"rows", "contexts", "windows", "disk_bytes"}


def test_a_dry_run_probes_a_local_model_and_writes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    command = ["harvest", "--model", tiny_llama, "--dataset", "builtin:pydoc", "--site", "mlp.1", "--rows", 5000]
    command += ["--context-size", 64, "--device", "cpu", "--out", tmp_path / "s", "--dry-run"]
    told = json.loads(gsae(*command, "--json", "--batch-size", "auto").stdout)
    assert told["batch_size"] == 64
    assert told["seconds"] > 0
    assert json.loads(gsae(*command, "--json", "--no-probe").stdout)["seconds"] is None
    assert "measured on" in gsae(*command).stdout
    assert not (tmp_path / "s").exists()


def test_weights_are_local_if_nothing_has_to_be_downloaded(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert weights_are_local(str(tiny_llama), None)
    assert weights_are_local("builtin:smollm2-135m", None)
    assert not weights_are_local("nobody/has-this", None)


def test_without_room_on_the_disk_nothing_is_written_unless_forced(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "store"
    free(monkeypatch, 500_000)
    with pytest.raises(
        SpaceError, match=r"needs about 0\.00\d+ GB more, and its disk has 0\.0005 GB free.*--force"
    ) as caught:
        harvest(config(tiny_llama), out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    command = [
        "harvest",
        "--model",
        tiny_llama,
        "--dataset",
        "builtin:pydoc",
        "--site",
        "mlp.1,resid.0",
        "--rows",
        20000,
    ]
    command += ["--context-size", 64, "--window-rows", 4096, "--heldout", 0.1, "--device", "cpu", "--out", out]
    refused(6, "GB more", *command)
    assert gsae(*command, "--force").returncode == 0
    assert open_store(out).plan.rows == 20000


def test_the_rows_of_a_whole_text_are_counted_before_the_model_is_loaded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 500_000)
    with pytest.raises(SpaceError, match="GB more"):
        harvest(config(tiny_llama, rows=None), tmp_path / "s", load=lambda config: pytest.fail("it was loaded"))
    assert not (tmp_path / "s" / "plan.json").exists()


def test_a_resumed_run_needs_room_only_for_the_missing_windows(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop_near_the_end(event: Any) -> None:
        if isinstance(event, BatchDone) and event.rows > 0.7 * event.total:
            raise Stop

    asked, out = config(tiny_llama), tmp_path / "store"
    with pytest.raises(Stop):
        harvest(asked, out, stop_near_the_end)
    assert files(out / "shards")
    free(monkeypatch, 1_600_000)
    with pytest.raises(SpaceError):
        harvest(asked, tmp_path / "another")
    assert harvest(asked, out) is not None


def test_the_progress_line_of_a_harvest_shows_rate_size_ratio_and_waiting() -> None:
    event = BatchDone(rows=10, total=100, tokens=3000, seconds=2.0, written=670_000_000, raw=1_000_000_000, busy=1.9)
    assert rate(event) == "rows, 1,500 tokens/s, 0.67 GB written, ratio 0.670, device waiting 5 %"
    assert rate(BatchDone(1, 2, 3, 0.0, 0, 0, 0.0)).endswith("tokens/s, 0.00 GB written, device waiting 0 %")
