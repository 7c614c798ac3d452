"""What `to_delphi` writes is what a search over the store in float64 finds, read as delphi's loader reads it.

bench/export_delphi.py loads the same files with delphi itself.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from gsae.errors import CorruptError, IncompatibleError, NotFoundError
from gsae.features import Vocabulary, find_features
from gsae.features.export import delphi
from gsae.features.export.delphi import to_delphi
from gsae.store import Store
from gsae.tests.support.saes import D_SAE, reconstruct, training_notes, write_sae
from gsae.tests.support.stores import make_store


@pytest.fixture
def features(tmp_path: Path, tiny_store: Store) -> Path:
    write_sae(tmp_path / "run", "gated", 0, training_notes(tiny_store))
    find_features(tmp_path / "run", tiny_store, Vocabulary())
    return tmp_path / "run" / "features" / "gated-0"


def assert_loads(folder: Path) -> tuple[dict[tuple[int, int, int], float], list[dict[str, NDArray[Any]]]]:
    """Every entry as (context's number, position, latent) -> value, and the files in order, as their loader does it."""
    files = sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0]))
    entries, tensors = {}, [load_file(path) for path in files]
    for path, data in zip(files, tensors, strict=True):
        first, last = map(int, path.stem.split("_"))
        assert len(data["locations"]) == len(data["activations"])
        for (context, position, latent), value in zip(data["locations"].tolist(), data["activations"], strict=True):
            assert first <= first + latent <= last
            entries[context, position, first + latent] = float(value)
    return entries, tensors


@pytest.mark.parametrize("entries_a_file", [1 << 23, 200])
def test_every_feature_above_0_is_there_by_context_position_and_latent(
    features: Path, tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries_a_file: int
) -> None:
    monkeypatch.setattr(delphi, "FILE_ENTRIES", entries_a_file)
    folder = to_delphi(features, tiny_store, tmp_path / "out")

    site, size = tiny_store.site("mlp.1", split="heldout"), tiny_store.plan.context_size
    x = site[:].double().numpy()
    kept = np.linalg.norm(x, axis=1) < training_notes(tiny_store)["norm_limit"]
    values = reconstruct("gated", 0, x[kept])[0]
    heldout = np.flatnonzero(tiny_store.split() == 1).tolist()
    expected = {}
    for source, row in zip(site.sources(slice(None))[kept].tolist(), values, strict=True):
        for latent in np.flatnonzero(row > 0).tolist():
            expected[heldout.index(source // size), source % size, latent] = row[latent]

    found, files = assert_loads(folder)
    assert folder == tmp_path / "out" / "latents" / site.spec.module
    assert (len(files) > 3) == (entries_a_file == 200)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-5, atol=2e-6)
    for data in files:
        rows = data["locations"].tolist()
        assert rows == sorted(rows)
        assert data["locations"].dtype == np.uint16
        assert data["tokens"].tolist() == tiny_store.tokens()[heldout].tolist()
        assert data["contexts"].tolist() == heldout
    config = json.loads((folder / "config.json").read_text())
    assert config["cache_ctx_len"] == size
    assert config["n_splits"] == len(files)


def test_ranges_join_to_all_latents_without_a_gap(
    features: Path, tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delphi, "FILE_ENTRIES", 1)
    folder = to_delphi(features, tiny_store, tmp_path / "out")
    edges = sorted(tuple(map(int, path.stem.split("_"))) for path in folder.glob("*.safetensors"))
    assert edges[0][0] == 0
    assert edges[-1][1] == D_SAE - 1
    assert [first for first, _ in edges[1:]] == [last + 1 for _, last in edges[:-1]]


def test_a_stopped_export_has_no_config_and_ends_in_the_same_bytes(
    features: Path, tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delphi, "FILE_ENTRIES", 200)
    whole = to_delphi(features, tiny_store, tmp_path / "whole")

    def stop(event: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_delphi(features, tiny_store, tmp_path / "stopped", stop)
    folder = tmp_path / "stopped" / "latents" / whole.name
    (first,) = folder.iterdir()
    inode = first.stat().st_ino
    to_delphi(features, tiny_store, tmp_path / "stopped")
    assert first.stat().st_ino == inode
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert to_delphi(features, tiny_store, tmp_path / "stopped") == folder


def test_what_cannot_be_exported_is_refused(features: Path, tiny_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(NotFoundError, match="Run `gsae features"):
        to_delphi(features.parent / "gated-7", tiny_store, out)
    with pytest.raises(IncompatibleError, match="made on another store"):
        to_delphi(features, make_store(tmp_path / "other", contexts=20), out)
    facts = (features / "features.json").read_text()
    (features / "features.json").write_text(facts.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(IncompatibleError, match="has schema 2, this gsae reads up to 1: update gsae"):
        to_delphi(features, tiny_store, out)
    (features / "features.json").write_text(facts.replace('"weights_sha256": "', '"weights_sha256": "0'))
    with pytest.raises(IncompatibleError, match=r"is not what .*features\.json describes"):
        to_delphi(features, tiny_store, out)
    (features / "features.json").write_text(facts.replace('"module": "', '"module": "../'))
    with pytest.raises(CorruptError, match="no name of a folder"):
        to_delphi(features, tiny_store, out)
    (features / "features.json").write_text(facts)
    assert not out.exists()
    shutil.rmtree(features / "activations")
    with pytest.raises(NotFoundError, match="was deleted"):
        to_delphi(features, tiny_store, out)


def test_a_missing_file_of_activations_is_noticed(
    tmp_path: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae.features.find.firings.FILE_ROWS", 100)
    write_sae(tmp_path / "run", "gated", 0, training_notes(tiny_store))
    find_features(tmp_path / "run", tiny_store, Vocabulary())
    features = tmp_path / "run" / "features" / "gated-0"
    sorted((features / "activations").iterdir())[-1].unlink()
    with pytest.raises(CorruptError, match="is incomplete"):
        to_delphi(features, tiny_store, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("config.json"))


def test_a_folder_that_holds_something_else_is_refused_and_kept(
    features: Path, tiny_store: Store, tmp_path: Path
) -> None:
    folder = to_delphi(features, tiny_store, tmp_path / "out")
    (name,) = [path.name for path in folder.glob("*.safetensors")]
    theirs = folder / "0_9.safetensors"
    theirs.write_bytes(b"theirs")
    with pytest.raises(IncompatibleError, match="is not of this export"):
        to_delphi(features, tiny_store, tmp_path / "out")
    assert theirs.read_bytes() == b"theirs"
    theirs.unlink()
    (folder / name).write_bytes(b"theirs")
    with pytest.raises(IncompatibleError, match="is not of this export"):
        to_delphi(features, tiny_store, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(IncompatibleError, match="is a file, or below one"):
        to_delphi(features, tiny_store, tmp_path / "file")
