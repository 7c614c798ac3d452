"""Metrics equal brute force in float64 and do not depend on how rows are cut into batches."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from gsae.evaluate.measurement import Measurement, NormBands
from gsae.evaluate.norms_pass import read_norms
from gsae.evaluate.ratio_errors import ratio_of_sums
from gsae.store import Store

Floats = NDArray[np.float64]


class Linear:
    """An SAE whose products are exact in float32: small integers times small integers."""

    def __init__(self, d_in: int, d_sae: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.d_in, self.d_sae = d_in, d_sae
        self.W_enc = torch.from_numpy(draw.integers(-2, 3, (d_in, d_sae)).astype(np.float32))
        self.W_dec = torch.from_numpy(draw.integers(-2, 3, (d_sae, d_in)).astype(np.float32)) / 16
        self.b_enc = torch.from_numpy(draw.integers(-9, 3, d_sae).astype(np.float32))
        self.b_dec = torch.from_numpy(draw.integers(-3, 4, d_in).astype(np.float32)) / 4

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc + self.b_enc)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec


class Scaling:
    """An "SAE" that returns a multiple of its input, with one latent for each dimension."""

    def __init__(self, d_in: int, scale: float) -> None:
        self.d_in, self.d_sae, self.scale = d_in, d_in, scale

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, f: Tensor) -> Tensor:
        return f * self.scale


def make_rows(seed: int, n: int, d_in: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Rows of small integers about a large mean, a few of huge norm, and the document of each."""
    draw = np.random.default_rng(seed)
    x = draw.integers(-4, 5, (n, d_in)) + 20 * (np.arange(d_in) == 1)
    x[draw.random(n) < 0.1] *= 8
    return torch.from_numpy(x.astype(np.float32)), draw.integers(0, 5, n)


def measure(
    sae: Any,
    x: Tensor,
    document: NDArray[np.int64],
    limit: float,
    cuts: list[int],
    shift: Floats | None = None,
    cut: float = np.inf,
) -> Measurement:
    mean = np.zeros(x.shape[1]) if shift is None else shift
    measured = Measurement({"sae": sae}, mean, 5, NormBands(limit, cut))
    for part, where in zip(np.split(x.numpy(), cuts), np.split(document, cuts), strict=True):
        measured.add(torch.from_numpy(part), where)
    return measured


def brute_force(sae: Linear, x: Floats) -> dict[str, float]:
    """The definitions as they are written, on whole arrays."""
    f = np.maximum(x @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy(), 0)
    y = f @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()
    mu = x.mean(0)
    lengths = np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1)
    norms = lengths[0] * lengths[1]
    return {
        "l0": (f != 0).sum(1).mean(),
        "explained_variance": 1 - ((x - y) ** 2).sum() / ((x - mu) ** 2).sum(),
        "mse": ((x - y) ** 2).sum(1).mean(),
        "gamma": (y**2).sum(1).mean() / (y * x).sum(1).mean(),
        "gamma_centred": ((y - mu) ** 2).sum(1).mean() / ((y - mu) * (x - mu)).sum(1).mean(),
        "cossim": np.divide((x * y).sum(1), norms, out=np.zeros(len(x)), where=norms > 0).mean(),
        "l2_ratio": np.divide(*lengths, out=np.zeros(len(x)), where=lengths[1] > 0).mean(),
    }


@pytest.mark.parametrize(("limit", "cut"), [(np.inf, np.inf), (60.0, np.inf), (60.0, 100.0), (100.0, 60.0)])
def test_every_metric_equals_brute_force_on_kept_rows_on_all_and_without_the_largest(limit: float, cut: float) -> None:
    sae, (x, document) = Linear(6, 20, 0), make_rows(0, 300, 6)
    counted = measure(sae, x, document, limit, [7, 100, 299], cut=cut).saes["sae"]
    wide = x.double().numpy()
    norms = np.linalg.norm(wide, axis=1)
    for totals, which in (
        (counted.kept, norms < limit),
        (counted.below_cut, norms < cut),
        (counted.all, norms < np.inf),
    ):
        assert 0 < totals.rows == which.sum()
        assert totals.metrics().model_dump() == pytest.approx(brute_force(sae, wide[which]), rel=1e-12)
    assert (counted.kept.rows < 300) == (limit < np.inf)
    assert (counted.below_cut.rows < 300) == (cut < np.inf)


def test_the_first_pass_finds_the_exact_mean_and_the_exact_largest_thousandth(tiny_store: Store) -> None:
    site = tiny_store.site("mlp.1", split="train")
    wide = np.concatenate([x.double().numpy() for _, x in site.in_order(512)])
    norms = np.linalg.norm(wide, axis=1)
    limit = float(np.quantile(norms, 0.9))
    told: list[int] = []
    found = read_norms(site, limit, 500, told.append)
    assert told[-1] == site.rows == len(wide)
    assert (norms >= found.norm_cut).sum() == len(wide) // 1000 == 7
    assert np.allclose(found.mean, wide[norms < limit].mean(0), rtol=1e-12, atol=1e-14)
    assert read_norms(site, limit, 77, told.append).norm_cut == found.norm_cut


def test_the_density_histogram_counts_every_latent_once_in_its_bin() -> None:
    x = torch.zeros(1000, 6)
    for latent, rows in enumerate((1, 10, 100, 1000, 0, 178)):  # log10 of the shares: -3, -2, -1, 0, none, -0.7496
        x[:rows, latent] = 1
    found = measure(Scaling(6, 1.0), x, np.zeros(1000, np.int64), np.inf, []).saes["sae"].density()
    edges, counts = found.log10_edges, found.latents
    assert found.silent == 1
    assert sum(counts) == 5
    at = {round(low, 2): n for low, n in zip(edges, counts, strict=False) if n}
    assert at == {-3.0: 1, -2.0: 1, -1.0: 1, -0.75: 1, -0.25: 1}
    assert edges[-1] == 0.0


def test_a_ratio_of_sums_has_the_error_of_the_jackknife() -> None:
    draw = np.random.default_rng(0)
    b = draw.uniform(50, 150, 400)
    a = 3 * b + draw.standard_normal(400) * b / 10
    without = np.array([(a.sum() - a[i]) / (b.sum() - b[i]) for i in range(400)])
    jackknife = np.sqrt(399 / 400 * ((without - without.mean()) ** 2).sum())
    found = ratio_of_sums(a, b)
    assert found.value == a.sum() / b.sum()
    assert found.error == pytest.approx(jackknife, rel=0.01)
    assert found.complement().error == found.error
    assert ratio_of_sums(a[:1], b[:1]).error is None
    assert ratio_of_sums(a, 0 * b).value is None


def test_silent_and_dense_latents_are_counted_over_kept_rows() -> None:
    x = torch.zeros(100, 5)
    x[:10, 0], x[:11, 1], x[:, 2], x[7, 4] = 1, 1, 1, 1
    x[50, 3] = 100.0  # beyond the limit, so latent 3 stays silent
    counted = measure(Scaling(5, 1.0), x, np.zeros(100, np.int64), 50.0, []).saes["sae"]
    assert counted.fires.tolist() == [10, 11, 99, 0, 1]
    assert counted.silent == 0.2
    assert counted.dense == 0.6  # 10 of 99 rows are more than a tenth


def test_a_latent_on_exactly_a_tenth_of_the_rows_is_not_dense() -> None:
    x = torch.zeros(100, 2)
    x[:10, 0], x[:11, 1] = 1, 1
    assert measure(Scaling(2, 1.0), x, np.zeros(100, np.int64), np.inf, []).saes["sae"].dense == 0.5


def test_sums_by_document_add_up_and_sst_is_about_the_mean_of_all_kept_rows() -> None:
    sae, (x, document) = Linear(6, 20, 1), make_rows(1, 200, 6)
    wide = x.double().numpy()
    keep = np.linalg.norm(wide, axis=1) < 60
    mu = wide[keep].mean(0)
    measured = measure(sae, x, document, 60.0, [50], mu)
    counted, inputs = measured.saes["sae"], measured.inputs.columns
    sums = counted.sums.columns
    for i in range(5):
        mine = wide[keep & (document == i)]
        expected = brute_force(sae, mine)
        assert inputs["rows"][i] == len(mine)
        assert inputs["sst"][i] == pytest.approx(((mine - mu) ** 2).sum(), rel=1e-11)
        assert sums["sse"][i] == pytest.approx(expected["mse"] * len(mine), rel=1e-12)
        assert sums["l0"][i] == pytest.approx(expected["l0"] * len(mine))
        assert sums["square"][i] / sums["cross"][i] == pytest.approx(expected["gamma"], rel=1e-12)
    assert inputs["sst"].sum() == pytest.approx(counted.kept.sst, rel=1e-12)


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 120), max_size=6), shuffle=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_batches_and_row_order_do_not_matter(seed: int, cuts: list[int], shuffle: int) -> None:
    sae, (x, document) = Linear(5, 11, seed), make_rows(seed, 120, 5)
    once = measure(sae, x, document, 70.0, [])
    order = np.random.default_rng(shuffle).permutation(120)
    cut = measure(sae, x[order], document[order], 70.0, sorted(cuts))
    a, b = once.saes["sae"], cut.saes["sae"]
    assert torch.equal(a.fires, b.fires)
    assert a.density() == b.density()
    assert np.array_equal(a.sums.columns["l0"], b.sums.columns["l0"])
    assert a.kept.rows == b.kept.rows
    for one, two in ((a.sums, b.sums), (once.inputs, cut.inputs)):
        for name, column in one.columns.items():
            assert np.allclose(column, two.columns[name], rtol=1e-10)
    assert a.kept.metrics().model_dump() == pytest.approx(b.kept.metrics().model_dump(), rel=1e-11)


def test_a_mean_a_million_times_the_spread_costs_no_digits_when_it_is_the_shift() -> None:
    draw = np.random.default_rng(3)
    x = draw.standard_normal((500, 3)).astype(np.float32) + np.float32(2**20)
    wide = x.astype(np.float64)
    shift = wide[:50].mean(0)
    counted = measure(Scaling(3, 1.0), torch.from_numpy(x), np.zeros(500, np.int64), np.inf, [], shift).saes["sae"]
    assert counted.kept.sst == pytest.approx(((wide - wide.mean(0)) ** 2).sum(), rel=1e-12)
    assert counted.kept.metrics().gamma_centred == pytest.approx(1.0, rel=1e-12)


def test_shrinkage_shows_in_gamma_and_a_perfect_reconstruction_is_perfect() -> None:
    x, document = make_rows(5, 80, 4)
    perfect = measure(Scaling(4, 1.0), x, document, np.inf, []).saes["sae"].kept.metrics().model_dump()
    assert perfect["mse"] == 0.0
    assert perfect["explained_variance"] == 1.0
    assert perfect["gamma"] == 1.0
    half = measure(Scaling(4, 0.5), x, document, np.inf, []).saes["sae"].kept.metrics().model_dump()
    assert half["gamma"] == pytest.approx(0.5)
    assert half["cossim"] == pytest.approx(1.0)
    assert half["l2_ratio"] == pytest.approx(0.5)


def test_what_is_not_defined_is_none() -> None:
    same = torch.ones(5, 3)
    counted = measure(Scaling(3, 0.0), same, np.zeros(5, np.int64), np.inf, []).saes["sae"]
    found = counted.kept.metrics().model_dump()
    assert found["gamma"] is None
    assert found["explained_variance"] is None
    assert found["cossim"] == found["l2_ratio"] == 0.0
    assert set(counted.bands[2].metrics().model_dump().values()) == {None}


def test_bfloat16_rows_are_measured_as_they_are_stored() -> None:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    counted = measure16(x).saes["sae"]
    wide = x.double().numpy()
    assert counted.kept.sst == pytest.approx(((wide - wide.mean(0)) ** 2).sum(), rel=1e-12)


def measure16(x: Tensor) -> Measurement:
    measured = Measurement({"sae": Scaling(5, 1.0)}, np.zeros(5), 1, NormBands(np.inf))
    measured.add(x, np.zeros(len(x), np.int64))
    return measured
