"""The formulas by hand, the start of training, the folding of the scale, and an architecture that is added."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.store import Store
from gsae.tests.support.params import normal, random_params
from gsae.tests.support.topk import TopKParams
from gsae.train import RunConfig, load_sae, parse_sae, train
from gsae.train.architectures.gated import GatedParams
from gsae.train.architectures.registry import ARCHITECTURES


def test_a_gated_sae_by_hand() -> None:
    one = torch.tensor
    sae = GatedParams(
        W_enc=one([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        W_dec=one([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]),
        b_dec=one([1.0, 1.0]),
        b_gate=one([0.0, -1.0, -9.0]),
        b_mag=one([0.5, 0.0, 0.0]),
        r_mag=torch.log(one([2.0, 3.0, 1.0])),
    )
    x = one([[2.0, 3.0], [1.0, 2.0]])
    # a = [[1, 2, 3], [0, 1, 1]]; pi_gate = [[1, 1, -6], [0, 0, -8]]: a gate at 0 is shut.
    torch.testing.assert_close(sae.encode(x), one([[2.5, 6.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(sae.decode(sae.encode(x)), one([[3.5, 7.0], [1.0, 1.0]]))
    # Errors (1.5, 4), (0, 1); auxiliary x_aux = (2, 2), (1, 1); penalty 0.5 * (1 + 1).
    torch.testing.assert_close(sae.loss(x, 0.5), one((1.5**2 + 16 + 1 + 1 + 1 + 1.0) / 2))


@pytest.mark.parametrize("arch", ["gated", "gated-unfrozen"])
def test_the_auxiliary_loss_trains_the_decoder_of_the_unfrozen_variant_only(arch: str) -> None:
    sae = random_params(arch, 5, 9)
    W_dec, b_dec = sae.W_dec.requires_grad_(), sae.b_dec.requires_grad_()
    # With every magnitude at zero the main reconstruction is b_dec, so a gradient of W_dec is the auxiliary loss's.
    shut: Any = replace(sae, b_mag=torch.full((9,), -1e6, dtype=torch.float64))
    x = normal(20, 5, seed=1)
    assert (shut.gates(x)[0] > 0).any()
    dW_dec, db_dec = torch.autograd.grad(shut.loss(x, 0.0), (W_dec, b_dec))
    assert (dW_dec.abs().max() > 0) == (arch == "gated-unfrozen")
    assert db_dec.abs().max() > 0


@pytest.mark.parametrize("arch", ["gated", "relu"])
def test_training_starts_from_the_seed_alone(arch: str) -> None:
    mean = torch.arange(6.0)
    a, b, other = (ARCHITECTURES[arch].initial(6, 10, seed, mean) for seed in (3, 3, 4))
    assert torch.equal(a.W_dec, b.W_dec)
    assert not torch.equal(a.W_dec, other.W_dec)
    assert torch.equal(a.W_enc, a.W_dec)
    assert torch.equal(a.b_dec, mean)
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(10))
    assert all(not getattr(a, name).any() for name in a.names()[3:])


@pytest.mark.parametrize("arch", ["gated", "relu"])
@pytest.mark.parametrize("scale", [0.01, 37.0])
def test_folding_the_scale_changes_nothing_but_the_units(arch: str, scale: float) -> None:
    sae = random_params(arch, 16, 40)
    raw: Any = sae.folded(scale)
    z = torch.randn(300, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = z / scale
    f = sae.encode(z)
    assert 0.05 < (f > 0).double().mean() < 0.95
    torch.testing.assert_close(raw.encode(x) * scale, f, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(raw.decode(raw.encode(x)) * scale, sae.decode(f), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(raw.W_dec.norm(dim=1), torch.ones(40, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_new_architecture_is_one_file_and_one_line_of_the_registry(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "topk", TopKParams)  # the line
    run = RunConfig(site="mlp.1", steps=60, batch_size=96, threads=1, device="cpu", lr=3e-3,
                    saes=parse_sae("topk width=48"))  # fmt: skip
    train(tiny_store.site("mlp.1"), run, tmp_path / "run")
    sae = load_sae(tmp_path / "run" / "saes" / "topk-w48-l1_0-seed0")
    assert (sae.architecture, sae.metadata["architecture"]) == ("topk", "topk")
    x = torch.cat([rows.float() for _, rows in tiny_store.site("mlp.1", "heldout").in_order()])
    f = sae.encode(x)
    assert (f > 0).sum(1).max() == TopKParams.K
    start = TopKParams.initial(32, 48, 0, torch.zeros(32))
    assert (x - sae.decode(f)).square().sum() < 0.9 * (x - start.decode(start.encode(x))).square().sum()
    again = RunConfig(site="mlp.1", steps=1, batch_size=96, threads=1, device="cpu", lr=1e-12,
                      init=str(tmp_path / "run/saes/topk-w48-l1_0-seed0"), saes=parse_sae("topk width=48"))  # fmt: skip
    train(tiny_store.site("mlp.1"), again, tmp_path / "again")
    tuned = load_sae(tmp_path / "again" / "saes" / "topk-w48-l1_0-seed0")
    torch.testing.assert_close(tuned.params.W_dec, sae.params.W_dec, rtol=1e-5, atol=1e-7)
