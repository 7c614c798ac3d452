"""The claims of the paper on rows with a known dictionary: features found, no shrinkage, a decoder best left frozen."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gsae.tests.support.stores import directions, make_store, sparse_rows
from gsae.train import SAE, RunConfig, load_sae, parse_sae, train

FEATURES, D_IN = 64, 48


def measured(sae: SAE, x: Tensor) -> dict[str, float]:
    """Mean over true features of the largest cosine with a direction, and metrics on held-out rows x (rows, d_in)."""
    truth = torch.from_numpy(directions(D_IN, FEATURES)).float()
    f = sae.encode(x)
    x_hat = sae.decode(f)
    error, spread = (x - x_hat).square().sum(), (x - x.mean(0)).square().sum()
    return {
        "found": float((torch.nn.functional.normalize(sae.params.W_dec, dim=1) @ truth.T).amax(0).mean()),
        "gamma": float(x_hat.square().sum() / (x_hat * x).sum()),
        "l0": float((f > 0).sum() / len(x)),
        "explained_variance": float(1 - error / spread),
    }


@pytest.mark.slow
def test_gated_finds_the_features_unshrunk_the_baseline_shrinks_and_unfreezing_the_auxiliary_decoder_does_not_help(
    tmp_path: Path,
) -> None:
    rows = partial(sparse_rows, features=FEATURES, l0=4.0)
    store = make_store(tmp_path / "store", contexts=500, window_rows=4096, sites={"mlp.1": D_IN}, rows=rows)
    lines = ("gated width=64 l1=.4", "gated width=64 l1=.4 variant=unfrozen", "relu width=64 l1=.35")
    run = RunConfig(site="mlp.1", steps=1000, batch_size=256, threads=1, device="cpu", lr=3e-3, log_every=500,
                    saes=tuple(sae for line in lines for sae in parse_sae(line)))  # fmt: skip
    train(store.site("mlp.1"), run, tmp_path / "run")
    x = torch.cat([rows.float() for _, rows in store.site("mlp.1", "heldout").in_order()])
    saes = [load_sae(tmp_path / "run/saes" / sae.name) for sae in run.named_saes()]
    gated, unfrozen, relu = (measured(sae, x) for sae in saes)
    assert gated["found"] > 0.95
    assert abs(gated["gamma"] - 1) < 0.02
    assert relu["gamma"] < 0.95
    assert relu["l0"] == pytest.approx(gated["l0"], rel=0.15)
    # The baseline at no fewer open latents explains less.
    assert relu["explained_variance"] < gated["explained_variance"]
    # A decoder that the auxiliary loss trains too is another one, and with as many open latents it is no better.
    moved = (saes[1].params.W_dec - saes[0].params.W_dec).norm(dim=1)
    assert moved.median() > 0.01
    assert saes[1].metadata["architecture"] == "gated-unfrozen"
    assert unfrozen["l0"] == pytest.approx(gated["l0"], rel=0.1)
    assert unfrozen["explained_variance"] < gated["explained_variance"] + 0.005
    assert unfrozen["found"] < gated["found"] + 0.005
