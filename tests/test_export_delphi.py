"""What is exported for delphi holds every feature above 0 where delphi's loader looks for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from gsae.evaluate import Words, delphi, find_features, to_delphi
from gsae.store import CorruptError, IncompatibleError, NotFoundError, Store
from gsae.tests.command import gsae
from gsae.tests.stores import make_store
from gsae.tests.test_evaluation import D_SAE, noted, write_sae
from gsae.tests.test_features import brute

MODULE = "model.layers.1.mlp"


@pytest.fixture
def features(tmp_path: Path, tiny_store: Store) -> Path:
    write_sae(tmp_path / "run", "gated", 0, noted(tiny_store))
    find_features(tmp_path / "run", tiny_store, Words())
    return tmp_path / "run" / "features" / "gated-0"


def joined(folder: Path) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """All locations (n, 3), with the latents' own numbers, and activations (n,)."""
    locations, activations = [], []
    for path in folder.glob("*.safetensors"):
        found = load_file(path)
        first = int(path.stem.split("_")[0])
        locations.append(found["locations"].astype(np.int64) + np.array([0, 0, first]))
        activations.append(found["activations"])
    return np.concatenate(locations), np.concatenate(activations)


def test_every_feature_above_0_is_at_its_context_position_and_latent(
    features: Path, tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delphi, "FILE_ENTRIES", 900)
    folder = to_delphi(features, tiny_store, tmp_path / "out")
    assert folder == tmp_path / "out" / "latents" / MODULE
    names = sorted(tuple(map(int, path.stem.split("_"))) for path in folder.glob("*.safetensors"))
    assert len(names) > 3
    assert [first for first, _ in names] == [0, *(last + 1 for _, last in names[:-1])]
    assert names[-1][1] == D_SAE - 1
    sources, wanted = brute(tiny_store, "gated")
    contexts = np.flatnonzero(tiny_store.split() == 1)
    size = tiny_store.plan.context_size
    for path in folder.glob("*.safetensors"):
        found = load_file(path)
        assert found["locations"].dtype == np.uint16
        assert np.array_equal(found["tokens"], tiny_store.tokens()[contexts])
        assert np.array_equal(found["contexts"], contexts)
        order = np.lexsort(found["locations"].T[::-1])
        assert np.array_equal(order, np.arange(len(order)))
    dense = np.zeros((len(contexts), size, D_SAE))
    locations, activations = joined(folder)
    dense[tuple(locations.T)] = activations
    assert len(locations) == np.count_nonzero(dense)
    expected = np.zeros_like(dense)
    expected[np.searchsorted(contexts, sources // size), sources % size] = wanted
    np.testing.assert_allclose(dense, expected, atol=2e-6)


def test_the_config_says_where_it_is_from_and_comes_last(features: Path, tiny_store: Store, tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "out" / "latents" / MODULE
    with pytest.raises(KeyboardInterrupt):
        to_delphi(features, tiny_store, tmp_path / "out", stop)
    assert list(folder.glob("*.safetensors"))
    assert not (folder / "config.json").exists()
    to_delphi(features, tiny_store, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_name"] == tiny_store.plan.model.id
    assert config["ctx_len"] == tiny_store.plan.context_size
    assert config["gsae"] == json.loads((features / "features.json").read_text())
    before = {path: path.read_bytes() for path in folder.iterdir()}
    to_delphi(features, tiny_store, tmp_path / "out")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_cannot_be_exported_is_told(features: Path, tiny_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(NotFoundError, match="Run `gsae features"):
        to_delphi(features.with_name("gated-7"), tiny_store, out)
    with pytest.raises(IncompatibleError, match="another store"):
        to_delphi(features, make_store(tmp_path / "other", contexts=30), out)
    facts = json.loads((features / "features.json").read_text())
    (features / "features.json").write_text(json.dumps(facts | {"schema": 2}))
    with pytest.raises(IncompatibleError, match="update gsae"):
        to_delphi(features, tiny_store, out)
    (features / "features.json").write_text(json.dumps(facts))
    (out / "latents" / MODULE).mkdir(parents=True)
    (out / "latents" / MODULE / "0_9.safetensors").write_bytes(b"of somebody else")
    with pytest.raises(IncompatibleError, match="not of this export"):
        to_delphi(features, tiny_store, out)
    assert (out / "latents" / MODULE / "0_9.safetensors").read_bytes() == b"of somebody else"
    (features / "features.json").write_text(json.dumps(facts | {"module": "../../up"}))
    with pytest.raises(CorruptError, match="no name of a folder"):
        to_delphi(features, tiny_store, tmp_path / "escaped")
    (features / "features.json").write_text(json.dumps(facts))
    for path in (features / "activations").iterdir():
        path.unlink()
    with pytest.raises(NotFoundError, match="was deleted"):
        to_delphi(features, tiny_store, tmp_path / "again")


def test_the_command_writes_it(features: Path, tiny_store: Store, tmp_path: Path) -> None:
    run = features.parent.parent
    asked = ["export", run / "gated-0", "--format", "delphi", "--out", tmp_path / "out"]
    done = gsae(*asked, "--store", tiny_store.path)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "config.json").exists()
