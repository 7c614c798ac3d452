"""Saved SAEs and checkpoints: round trips, other people's files, damaged files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gsae.errors import CorruptError, GsaeError, IncompatibleError, NotFoundError, SpaceError
from gsae.files import replace_file
from gsae.store import Store
from gsae.tests.support.params import random_params
from gsae.train.run.checkpoint import CHECKPOINT, Checkpoint, load_checkpoint, save_checkpoint
from gsae.train.sae import load_sae, save_sae
from gsae.train.sae_metadata import SAEMetadata

SCALE = 7.5


@pytest.fixture
def saved(tmp_path: Path, tiny_store: Store) -> Path:
    return save(tmp_path / "sae", tiny_store, "gated")


def save(folder: Path, store: Store, arch: str, **spec: Any) -> Path:
    site = store.site("mlp.1").spec.model_copy(update=spec)
    params = random_params(arch, 32, 50, dtype=torch.float32)
    noted = SAEMetadata.finite(architecture=arch, norm_limit=float("inf"), lr=1e-3)
    save_sae(folder, params, scale=SCALE, site=site, plan=store.plan, gsae=noted)
    return folder


@pytest.mark.parametrize("arch", ["gated", "relu"])
def test_a_saved_sae_does_to_raw_rows_what_training_did_to_scaled_ones(
    tmp_path: Path, tiny_store: Store, arch: str
) -> None:
    sae = load_sae(save(tmp_path / "sae", tiny_store, arch))
    trained = random_params(arch, 32, 50, dtype=torch.float32)
    z = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    f, raw = trained.encode(z), sae.encode(z / SCALE)
    assert (sae.d_in, sae.d_sae, sae.architecture) == (32, 50, arch)
    assert 0.05 < (f > 0).float().mean() < 0.95
    assert ((raw * SCALE - f).norm() / f.norm()) < 1e-6
    x_hat = trained.decode(f)
    assert ((sae.decode(raw) * SCALE - x_hat).norm() / x_hat.norm()) < 1e-6
    assert dict(sae.metadata) == {"architecture": arch, "norm_limit": None, "lr": 1e-3}


def test_the_files_are_saelens_layout(saved: Path) -> None:
    tensors = load_file(saved / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (32, 50), "W_dec": (50, 32), "b_dec": (32,), "b_gate": (50,), "b_mag": (50,), "r_mag": (50,),
    }  # fmt: skip
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors.values())
    cfg = json.loads((saved / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == ("gated", 32, 50, "float32")
    assert cfg["apply_b_dec_to_input"] is True
    assert cfg["normalize_activations"] == cfg["reshape_activations"] == "none"
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_mlp_out"
    assert cfg["metadata"]["prepend_bos"] is True


def test_the_baseline_is_saelens_standard_and_attention_sites_are_reshaped(tmp_path: Path, tiny_store: Store) -> None:
    folder = save(tmp_path / "sae", tiny_store, "relu", name="attn.1")
    cfg = json.loads((folder / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["reshape_activations"]) == ("standard", "hook_z")
    assert sorted(load_file(folder / "sae_weights.safetensors")) == ["W_dec", "W_enc", "b_dec", "b_enc"]


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_file_is_not_found(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(NotFoundError, match=f"{name} is missing"):
        load_sae(saved)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("keep", [0, 7, -1])
def test_a_cut_file_is_corrupt(saved: Path, name: str, keep: int) -> None:
    whole = (saved / name).read_bytes().rstrip()
    (saved / name).write_bytes(whole[:keep])
    with pytest.raises(CorruptError, match=name) as caught:
        load_sae(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"architecture": "topk"}, IncompatibleError),
        ({"architecture": "standard"}, CorruptError),
        ({"normalize_activations": "layer_norm"}, IncompatibleError),
        ({"apply_b_dec_to_input": False}, IncompatibleError),
        ({"d_sae": 51}, CorruptError),
        ({"d_sae": None}, CorruptError),
    ],
)
def test_a_cfg_that_contradicts_the_weights_or_is_not_ours_is_refused(
    saved: Path, change: dict[str, Any], error: type[GsaeError]
) -> None:
    cfg = json.loads((saved / "cfg.json").read_text())
    (saved / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(error) as caught:
        load_sae(saved)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    tensors = {"a": torch.tensor([1.5, float("nan"), -0.0]), "b": torch.arange(6).view(2, 3)}
    save_checkpoint(tmp_path, Checkpoint(7, {"epoch": 1, "offset": 2}, "d" * 64, 99, tensors))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.reader, found.digest) == (7, {"epoch": 1, "offset": 2}, "d" * 64)
    assert found.metrics_bytes == 99
    assert {n: t.numpy().tobytes() for n, t in found.tensors.items()} == {
        n: t.numpy().tobytes() for n, t in tensors.items()
    }
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_a_damaged_checkpoint_is_corrupt(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, Checkpoint(7, {}, "d" * 64, 0, {"a": torch.zeros(100)}))
    path = tmp_path / CHECKPOINT
    if damage == "foreign":
        save_file({"a": torch.zeros(3)}, path)
    else:
        path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else b"")
    with pytest.raises(CorruptError, match="not a checkpoint of gsae, or is damaged"):
        load_checkpoint(tmp_path)


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, lambda p: p.write_text("first"))

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SpaceError, match="No space left to write"):
        replace_file(path, full)
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
