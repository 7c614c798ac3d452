"""The export for dictionary_learning gives the same features with that project's formulas, which are written out here.

bench/export.py loads the same files with the project itself.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gsae.errors import IncompatibleError, NotFoundError
from gsae.features import to_dictionary_learning
from gsae.store import Store
from gsae.tests.support.command import gsae
from gsae.tests.support.params import random_params
from gsae.train import SAEMetadata, load_sae
from gsae.train.sae import save_sae

D_IN, D_SAE = 32, 71


def save(run: Path, store: Store, arch: str, seed: int = 0) -> Path:
    folder = run / "saes" / arch
    site = store.site("mlp.1").spec
    noted = SAEMetadata.finite(site="mlp.1", seed=seed, lr=1e-3, l1_coefficient=0.1, dead=float("nan"))
    save_sae(folder, random_params(arch, D_IN, D_SAE, seed), scale=0.3, site=site, plan=store.plan, gsae=noted)
    return folder


def gated_auto_encoder(w: dict[str, Tensor], x: Tensor) -> Tensor:
    a = (x - w["decoder_bias"]) @ w["encoder.weight"].T
    return (a + w["gate_bias"] > 0) * torch.relu(w["r_mag"].exp() * a + w["mag_bias"])


def auto_encoder(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.relu((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"])


@pytest.mark.parametrize(
    ("arch", "dict_class", "encode", "bias"),
    [
        ("gated", "GatedAutoEncoder", gated_auto_encoder, "decoder_bias"),
        ("relu", "AutoEncoder", auto_encoder, "bias"),
    ],
)
def test_the_export_has_their_names_and_our_features(
    tiny_store: Store, tmp_path: Path, arch: str, dict_class: str, encode: Callable[..., Tensor], bias: str
) -> None:
    folder = save(tmp_path, tiny_store, arch)
    out = to_dictionary_learning(folder, tmp_path / "out")

    weights: dict[str, Tensor] = torch.load(out / "ae.pt", weights_only=True)
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    ours, x = load_sae(folder), torch.randn(500, D_IN, generator=torch.Generator().manual_seed(3))
    features = encode(weights, x)
    assert 0.1 < (features > 0).double().mean() < 0.9
    torch.testing.assert_close(features, ours.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        features @ weights["decoder.weight"].T + weights[bias], ours.decode(ours.encode(x)), rtol=1e-5, atol=1e-5
    )
    trainer = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "submodule_name": "mlp.1"}
    assert config["trainer"].items() >= trainer.items()


def test_the_command_finds_an_sae_by_run_and_name_and_writes_the_same_bytes_again(
    tiny_store: Store, tmp_path: Path
) -> None:
    save(tmp_path / "run", tiny_store, "gated")
    first = gsae("export", tmp_path / "run" / "gated", "--out", tmp_path / "a")
    again = gsae("export", tmp_path / "run" / "saes" / "gated", "--out", tmp_path / "b")
    over = gsae("export", tmp_path / "run" / "gated", "--out", tmp_path / "a")

    assert (first.returncode, again.returncode, over.returncode) == (0, 0, 0)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["ae.pt", "config.json"]
    for name in ("ae.pt", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_cannot_be_exported_is_refused_and_nothing_is_lost(tiny_store: Store, tmp_path: Path) -> None:
    out = to_dictionary_learning(save(tmp_path / "one", tiny_store, "gated"), tmp_path / "out")
    before = (out / "ae.pt").read_bytes()

    with pytest.raises(IncompatibleError, match=r"ae\.pt is not of this export\. Choose another folder"):
        to_dictionary_learning(save(tmp_path / "two", tiny_store, "gated", seed=1), out)
    assert (out / "ae.pt").read_bytes() == before
    with pytest.raises(IncompatibleError, match="is a gated-untied SAE; dictionary_learning has no class for it"):
        to_dictionary_learning(save(tmp_path, tiny_store, "gated-untied"), tmp_path / "untied")
    assert not (tmp_path / "untied").exists()
    with pytest.raises(NotFoundError, match="There is no SAE in"):
        to_dictionary_learning(tmp_path / "nowhere", tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(IncompatibleError, match="is a file, or below one"):
        to_dictionary_learning(tmp_path / "one" / "saes" / "gated", tmp_path / "file")
