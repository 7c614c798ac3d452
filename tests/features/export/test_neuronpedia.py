"""`to_neuronpedia` writes the contents of the features' Parquet files as rows of Neuronpedia's tables, one a line."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from gsae.errors import IncompatibleError, NotFoundError, UsageError
from gsae.features import FeatureSettings, Vocabulary, find_features
from gsae.features.export import neuronpedia
from gsae.features.export.neuronpedia import to_neuronpedia
from gsae.store import Store
from gsae.tests.support.neuronpedia_tables import BATCHES, FILES, HANGS_ON, KEYS, faults
from gsae.tests.support.saes import D_IN, D_SAE, training_notes, write_sae

SMALL = FeatureSettings(top=4, quantiles=3, samples=2, bins=7, neighbours=5, logits=3)


@pytest.fixture
def features(tmp_path: Path, tiny_store: Store) -> Path:
    write_sae(tmp_path / "run", "gated", 0, training_notes(tiny_store))
    unembedding = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(9))
    texts = [f" wörd{token}" for token in range(int(tiny_store.tokens().max()) + 1)]
    find_features(tmp_path / "run", tiny_store, Vocabulary(texts, lambda rows: rows @ unembedding.T), settings=SMALL)
    return tmp_path / "run" / "features" / "gated-0"


def assert_batches(folder: Path, name: str) -> list[dict[str, Any]]:
    batches = sorted((folder / name).iterdir(), key=lambda path: int(path.name.split("-")[1].split(".")[0]))
    assert [path.name for path in batches] == [f"batch-{i}.jsonl.gz" for i in range(len(batches))]
    return [json.loads(line) for path in batches for line in gzip.decompress(path.read_bytes()).splitlines()]


def table(features: Path, name: str) -> list[dict[str, Any]]:
    return list(parquet.read_table(features / f"{name}.parquet").to_pylist())


def float32(values: Any) -> list[float]:
    return [float(value) for value in np.float32(values)]


def test_a_feature_has_the_values_of_its_latent(features: Path, tmp_path: Path) -> None:
    folder = to_neuronpedia(features, tmp_path / "out")
    found, latents = assert_batches(folder, "features"), table(features, "latents")
    texts = [row["text"] for row in table(features, "vocabulary")]
    assert [row["index"] for row in found] == [str(latent) for latent in range(D_SAE)]
    for row, latent in zip(found, latents, strict=True):
        assert row["frac_nonzero"] == latent["density"]
        assert np.float32(row["maxActApprox"]) == np.float32(latent["max"] or 0)
        assert row["freq_hist_data_bar_heights"] == (latent["histogram"] or [])
        assert len(row["freq_hist_data_bar_values"]) == len(row["freq_hist_data_bar_heights"])
        assert row["pos_str"] == [texts[token] for token in latent["promoted"]]
        assert float32(row["pos_values"]) == float32(latent["promoted_logits"])
        assert row["neg_str"] == [texts[token] for token in latent["suppressed"]]
        assert row["topkCosSimIndices"] == latent["neighbours"]
        assert float32(row["topkCosSimValues"]) == float32(latent["cosines"])
        if latent["rows"]:
            edges = np.linspace(0, latent["max"], SMALL.bins + 1)
            np.testing.assert_allclose(row["freq_hist_data_bar_values"], (edges[1:] + edges[:-1]) / 2, rtol=1e-6)


@pytest.mark.parametrize("group", [1024, 5])
def test_an_activation_is_an_example_with_all_of_its_context(
    features: Path, tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    monkeypatch.setattr(neuronpedia, "GROUP", group)
    folder = to_neuronpedia(features, tmp_path / "out")
    assert len(list((folder / "features").iterdir())) == -(-D_SAE // group)
    edges = {row["latent"]: row["quantile_edges"] for row in table(features, "latents")}
    examples, found = table(features, "examples"), assert_batches(folder, "activations")
    assert len({row["id"] for row in found}) == len(found) == len(examples)
    for row, example in zip(found, examples, strict=True):
        values = np.zeros(tiny_store.plan.context_size, np.float32)
        values[example["positions"]] = example["values"]
        assert row["index"] == str(example["latent"])
        assert row["tokens"] == [f" wörd{token}" for token in tiny_store.tokens()[example["context"]].tolist()]
        assert float32(row["values"]) == float32(values)
        assert row["maxValue"] == row["values"][row["maxValueTokenIndex"]] == max(row["values"])
        if example["kind"] == "top":
            assert row["maxValueTokenIndex"] == example["position"]
            assert row["binMin"] is row["binMax"] is row["binContains"] is row["qualifyingTokenIndex"] is None
        else:
            quantile = example["quantile"]
            assert float32([row["binMin"], row["binMax"]]) == float32(edges[example["latent"]][quantile : quantile + 2])
            assert row["qualifyingTokenIndex"] == example["position"]


def test_every_row_refers_to_the_model_and_the_source(features: Path, tmp_path: Path) -> None:
    folder = to_neuronpedia(features, tmp_path / "out")
    one = {
        name: json.loads((folder / f"{name}.jsonl").read_text()) for name in ("release", "model", "sourceset", "source")
    }
    model, source = one["model"]["id"], one["source"]["id"]
    assert folder == tmp_path / "out" / model / source
    assert source == f"1-{one['sourceset']['name']}"
    assert one["source"]["setName"] == one["sourceset"]["name"]
    assert one["sourceset"]["releaseName"] == one["release"]["name"]
    for name in ("features", "activations"):
        rows: dict[Any, int] = defaultdict(int)
        for row in assert_batches(folder, name):
            rows[row["modelId"], row["layer"]] += 1
        assert list(rows) == [(model, source)]


def test_a_batch_is_never_more_than_an_import_takes_at_once(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads((features / "features.json").read_text())
    whole = to_neuronpedia(features, tmp_path / "whole")
    latent = (SMALL.top + SMALL.quantiles * SMALL.samples) * facts["context_size"] * neuronpedia.TOKEN_BYTES
    monkeypatch.setattr(neuronpedia, "BATCH_BYTES", 3 * latent + latent // 2)
    cut = to_neuronpedia(features, tmp_path / "cut")
    for name in ("features", "activations"):
        assert len(list((whole / name).iterdir())) == 1
        assert len(list((cut / name).iterdir())) == -(-D_SAE // 3)
        assert assert_batches(cut, name) == assert_batches(whole, name)


def test_neuronpedias_tables_would_take_every_row(features: Path, tmp_path: Path) -> None:
    folder = to_neuronpedia(features, tmp_path / "out")
    rows = {table: assert_batches(folder, name) for name, table in BATCHES.items()}
    rows |= {table: [json.loads((folder / f"{name}.jsonl").read_text())] for name, table in FILES.items()}
    for table, found in rows.items():
        assert [fault for row in found for fault in faults(table, row)] == []
        keys = [tuple(row[column] for column in KEYS[table]) for row in found]
        assert len(set(keys)) == len(keys)
        for names, other in HANGS_ON.get(table, ()):
            there = {tuple(row[column] for column in KEYS[other]) for row in rows[other]}
            assert {tuple(row[column] for column in names) for row in found} <= there
    for table in rows:  # the check can fail
        lacking = {name: value for name, value in rows[table][0].items() if name != KEYS[table][0]}
        assert faults(table, lacking | {"other": 1}) == ["other is no column", f"{KEYS[table][0]} is missing"]


def test_paths_of_this_machine_are_in_no_row(features: Path, tmp_path: Path) -> None:
    facts = json.loads((features / "features.json").read_text())
    changed = facts | {"model": "/home/me/Models/Tiny-LM", "dataset": "/home/me/speeches.jsonl"}
    (features / "features.json").write_text(json.dumps(changed))
    folder = to_neuronpedia(features, tmp_path / "out")
    assert folder.parent.name == "tiny-lm"
    for name in (*FILES, *BATCHES):
        found = (folder / f"{name}.jsonl").read_text() if name in FILES else json.dumps(assert_batches(folder, name))
        assert "/home" not in found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stopped_export_has_no_source_and_ends_in_the_same_bytes(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia, "GROUP", 5)
    whole = contents(to_neuronpedia(features, tmp_path / "whole"))
    write, calls = neuronpedia._write_batch, 0

    def stop(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(neuronpedia, "_write_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        to_neuronpedia(features, tmp_path / "stopped")
    monkeypatch.setattr(neuronpedia, "_write_batch", write)
    assert not list((tmp_path / "stopped").rglob("source.jsonl"))
    assert len(list((tmp_path / "stopped").rglob("batch-*"))) == 3
    assert contents(to_neuronpedia(features, tmp_path / "stopped")) == whole


def test_what_cannot_be_exported_is_refused_and_nothing_is_lost(
    features: Path, tiny_store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(NotFoundError, match="Run `gsae features"):
        to_neuronpedia(features.parent / "gated-7", out)
    find_features(tmp_path / "run", tiny_store, Vocabulary(), settings=SMALL)
    with pytest.raises(UsageError, match="no texts of tokens"):
        to_neuronpedia(features, out)
    assert not out.exists()


def test_a_folder_that_holds_something_else_is_refused_and_kept(features: Path, tmp_path: Path) -> None:
    folder = to_neuronpedia(features, tmp_path / "out")
    facts = json.loads((features / "features.json").read_text())
    (features / "features.json").write_text(json.dumps(facts | {"rows": 1}))
    before = contents(folder)
    with pytest.raises(IncompatibleError, match="is not of this export"):
        to_neuronpedia(features, tmp_path / "out")
    assert contents(folder) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(IncompatibleError, match="is a file, or below one"):
        to_neuronpedia(features, tmp_path / "file")
