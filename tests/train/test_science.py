"""The claims of the paper and of docs/training.md on rows with a known dictionary, in superposition: with more features
than dimensions and more features than latents, which fire as unequally as those of a language model.
"""

from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsae.store import Store
from gsae.tests.support.devices import TRITON_DEVICE
from gsae.tests.support.params import random_params
from gsae.tests.support.stores import directions, make_store, sparse_rows
from gsae.train import SAE, RunConfig, load_sae, parse_sae, train
from gsae.train.architectures.registry import ARCHITECTURES

pytestmark = pytest.mark.slow

FEATURES, D_IN, D_SAE = 768, 32, 384
ACTIVE = 6.0  # features that a row has on average


def superposed_rows(rows: int, d_in: int) -> NDArray[Any]:
    """Sums of a few positive multiples of `directions`, feature n of which fires in proportion to 1 / n."""
    rng = np.random.default_rng(11)
    chance = 1 / np.arange(1, FEATURES + 1)
    firing = rng.random((rows, FEATURES)) < np.minimum(ACTIVE * chance / chance.sum(), 0.5)
    magnitudes = firing * (0.5 + rng.random((rows, FEATURES)))
    return (magnitudes @ directions(d_in, FEATURES)).astype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("science") / "store"
    return make_store(folder, contexts=1200, window_rows=8192, sites={"mlp.1": D_IN}, rows=superposed_rows)


def fitted(store: Store, out: Path, *lines: str, **settings: Any) -> list[dict[str, float]]:
    """The metrics on held-out rows of some SAEs, trained for 800 steps."""
    usual = {"site": "mlp.1", "steps": 800, "batch_size": 256, "threads": 1, "device": str(TRITON_DEVICE),
             "log_every": 400, "eval_every": 0, "on_divergence": "continue"}  # fmt: skip
    run = RunConfig(**(usual | settings), saes=tuple(sae for line in lines for sae in parse_sae(line)))
    train(store.site("mlp.1"), run, out)
    x = torch.cat([rows.float() for _, rows in store.site("mlp.1", "heldout").in_order()])
    return [measured(load_sae(out / "saes" / sae.name), x) for sae in run.named_saes()]


def measured(sae: SAE, x: Tensor) -> dict[str, float]:
    """Metrics on held-out rows x (rows, d_in)."""
    f = sae.encode(x)
    x_hat = sae.decode(f)
    error, spread = (x - x_hat).square().sum(), (x - x.mean(0)).square().sum()
    return {
        "gamma": float(x_hat.square().sum() / (x_hat * x).sum()),
        "l0": float((f > 0).sum() / len(x)),
        "explained_variance": float(1 - error / spread),
        "silent": float((~(f > 0).any(0)).float().mean()),
    }


def test_a_gated_sae_explains_more_with_fewer_latents_than_the_baseline_and_does_not_shrink(
    store: Store, tmp_path: Path
) -> None:
    gated, relu = fitted(store, tmp_path / "run", f"gated width={D_SAE} l1=.4", f"relu width={D_SAE} l1=.25", lr=3e-3)
    assert gated["l0"] < 0.7 * relu["l0"]  # measured: 17.5 and 31.2
    assert gated["explained_variance"] > relu["explained_variance"] + 0.05  # .844 and .743
    assert abs(gated["gamma"] - 1) < 0.03
    assert relu["gamma"] < 0.85


def test_a_scaled_start_explains_more_with_fewer_latents(store: Store, tmp_path: Path) -> None:
    (scaled,) = fitted(store, tmp_path / "scaled", f"gated width={D_SAE} l1=.5", lr=1e-3)
    (unit,) = fitted(store, tmp_path / "unit", f"gated width={D_SAE} l1=.2", lr=1e-3, encoder_start="unit")
    assert scaled["l0"] < unit["l0"]  # measured: 20.8 and 25.4
    assert scaled["explained_variance"] > unit["explained_variance"] + 0.03  # .847 and .783


def test_the_row_clip_keeps_an_sae_alive_at_a_high_rate(store: Store, tmp_path: Path) -> None:
    (clipped,) = fitted(store, tmp_path / "clip", f"gated width={D_SAE} l1=.15 lr=5e-2")
    (free,) = fitted(store, tmp_path / "free", f"gated width={D_SAE} l1=.15 lr=5e-2", row_clip=False)
    assert clipped["explained_variance"] > free["explained_variance"] + 0.2  # measured: .90 and .47
    assert clipped["silent"] < free["silent"] - 0.2  # .41 and .82


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_the_auxiliary_loss_of_a_frozen_decoder_has_no_gradient_by_it(kind: str) -> None:
    sae = random_params(kind, 7, 20)
    leaves = {name: tensor.requires_grad_() for name, tensor in vars(sae).items()}
    auxiliary = type(sae)(**leaves).terms(torch.randn(50, 7, dtype=torch.float64)).auxiliary.sum()
    if not auxiliary.requires_grad:
        assert float(auxiliary) == 0  # there is none
        return
    by_decoder, by_bias, by_gate = torch.autograd.grad(
        auxiliary, [leaves["W_dec"], leaves["b_dec"], leaves["W_enc"]], allow_unused=True
    )
    assert by_gate.abs().sum() > 1
    assert (by_decoder is not None) == (kind == "gated-unfrozen")
    assert kind != "gated-unfrozen" or by_decoder.abs().sum() > 1
    assert by_bias is not None  # the encoder reads x - b_dec


def test_every_feature_is_found_where_there_are_fewer_than_latents(tmp_path: Path) -> None:
    rows = partial(sparse_rows, features=64, l0=4.0)
    small = make_store(tmp_path / "store", contexts=500, window_rows=4096, sites={"mlp.1": 48}, rows=rows)
    run = RunConfig(site="mlp.1", steps=1000, batch_size=256, threads=1, device="cpu", lr=3e-3, log_every=500,
                    saes=parse_sae("gated width=64 l1=.4"))  # fmt: skip
    train(small.site("mlp.1"), run, tmp_path / "run")
    W_dec = load_sae(tmp_path / "run/saes" / run.named_saes()[0].name).params.W_dec
    truth = torch.from_numpy(directions(48, 64)).float()
    assert (torch.nn.functional.normalize(W_dec, dim=1) @ truth.T).amax(0).mean() > 0.95
