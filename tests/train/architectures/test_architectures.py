"""Every architecture of the paper, and its ablations, against the formula written out here and torch's own Adam."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsae.errors import IncompatibleError, NotFoundError
from gsae.store import Store
from gsae.tests.support.params import random_params
from gsae.tests.support.row_clip import step_with_row_clip
from gsae.tests.support.selection import mostly_slow
from gsae.train import RunConfig, load_sae, parse_sae, train
from gsae.train.architectures.registry import ARCHITECTURES
from gsae.train.run.computing import computing_with
from gsae.train.sae import save_sae, weights_sha256
from gsae.train.sae_metadata import SAEMetadata
from gsae.train.step.adam import Adam
from gsae.train.step.autograd_bank import AutogradBank
from gsae.train.step.fast_bank import FastBank

Tensors = dict[str, Tensor]
F64 = torch.float64
KINDS = sorted(ARCHITECTURES)


def gated(p: Tensors, x: Tensor, l1: float, *, frozen: bool = True) -> Tensor:
    centred = x - p["b_dec"]
    gate = centred @ p["W_enc"].T + p["b_gate"]
    if "W_mag" in p:
        magnitude = centred @ p["W_mag"].T + p["b_mag"]
    else:
        magnitude = torch.exp(p.get("r_mag", torch.zeros(()))) * (centred @ p["W_enc"].T) + p["b_mag"]
    f = torch.where(gate > 0, magnitude.clamp(min=0), 0)
    decoder, bias = (p["W_dec"].detach(), p["b_dec"].detach()) if frozen else (p["W_dec"], p["b_dec"])
    main = (f @ p["W_dec"] + p["b_dec"] - x).square().sum(1)
    auxiliary = (gate.clamp(min=0) @ decoder + bias - x).square().sum(1)
    return (main + auxiliary + l1 * gate.clamp(min=0).sum(1)).mean()


def unfrozen(p: Tensors, x: Tensor, l1: float) -> Tensor:
    return gated(p, x, l1, frozen=False)


def relu(p: Tensors, x: Tensor, l1: float) -> Tensor:
    f = ((x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]).clamp(min=0)
    return ((f @ p["W_dec"] + p["b_dec"] - x).square().sum(1) + l1 * f.sum(1)).mean()


def rescale_shift(p: Tensors, x: Tensor, l1: float) -> Tensor:
    pi = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    f = torch.where(pi > 0, (p["r_mag"].exp() * pi + p["b_shift"]).clamp(min=0), 0)
    return (f @ p["W_dec"] + p["b_dec"] - x).square().sum(1).mean()


LOSSES: dict[str, Callable[[Tensors, Tensor, float], Tensor]] = {
    "gated": gated,
    "gated-untied": gated,
    "gated-no_r_mag": gated,
    "gated-unfrozen": unfrozen,
    "relu": relu,
    "rescale-shift": rescale_shift,
}


def inputs(rows: int, d_in: int, seed: int = 9) -> Tensor:
    return torch.randn(rows, d_in, dtype=F64, generator=torch.Generator().manual_seed(seed)) / d_in**0.5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with computing_with(1):
        yield


def test_every_architecture_has_its_formula_here() -> None:
    assert sorted(LOSSES) == KINDS


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(rows=st.sampled_from([1, 2, 33]), d_sae=st.integers(1, 21), shift=st.sampled_from([-9.0, 0.0, 9.0]))
def test_all_gradients_equal_those_of_the_formula(kind: str, rows: int, d_sae: int, shift: float) -> None:
    sae = random_params(kind, 7, d_sae)
    getattr(sae, sae.GATE)[::2] += shift  # shuts gates, or opens all
    x = inputs(rows, 7)
    own, theirs = ({n: t.clone().requires_grad_() for n, t in vars(sae).items()} for _ in range(2))
    trained = [name for name in sae.names() if name not in sae.FROZEN]
    first = torch.autograd.grad(ARCHITECTURES[kind](**own).loss(x, 0.3), [own[n] for n in trained])
    second = torch.autograd.grad(LOSSES[kind](theirs, x, 0.3), [theirs[n] for n in trained])
    for name, a, b in zip(trained, first, second, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm() + 1e-15, name


@pytest.mark.parametrize("clip", mostly_slow([None, 0.2], 0.2))
@pytest.mark.parametrize("row_clip", mostly_slow([False, True], True))
@pytest.mark.parametrize("kind", mostly_slow(KINDS, "gated", "relu"))
def test_fifty_steps_equal_torchs_adam_with_projection_renormalisation_and_clipping(
    kind: str, row_clip: bool, clip: float | None
) -> None:
    start = [random_params(kind, 6, 11, seed) for seed in range(2)]
    bank = AutogradBank(start, torch.full((6,), 0.1), F64, clip=clip)
    trained = [name for name in start[0].names() if name not in start[0].FROZEN]
    theirs = [{n: t.clone() for n, t in vars(one).items()} for one in start]
    oracles = [torch.optim.Adam([p[n] for n in trained], lr=1e-2, betas=(0.0, 0.999), eps=1e-8) for p in theirs]
    l1, bounded = [0.1, 0.4], 0
    for step in range(1, 51):
        z = inputs(20, 6, step)
        adam = Adam(torch.tensor([1e-2, 1e-2], dtype=F64), 0.999, 1e-8, step, row_clip)
        batch = bank.step(z - bank.centre, torch.tensor(l1, dtype=F64), adam)
        for index, (p, oracle) in enumerate(zip(theirs, oracles, strict=True)):
            leaves = {n: t.detach().requires_grad_() for n, t in p.items()}
            loss = LOSSES[kind](leaves, z, l1[index])
            assert float(batch.loss(torch.tensor(l1, dtype=F64))[index]) == pytest.approx(
                20 * float(loss.detach()), rel=1e-9
            )
            for name, gradient in zip(trained, torch.autograd.grad(loss, [leaves[n] for n in trained]), strict=True):
                p[name].grad = gradient
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([p[n] for n in trained], clip)
            if "W_dec" in trained:
                along = (p["W_dec"].grad * p["W_dec"]).sum(1, keepdim=True)
                p["W_dec"].grad -= along * p["W_dec"]
            if row_clip:
                bounded += step_with_row_clip(oracle, {name: p[name] for name in trained}, 1e-2)
            else:
                oracle.step()
            if "W_dec" in trained:
                p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True)
    assert bounded > 50 or not row_clip
    for index, p in enumerate(theirs):
        for name, tensor in vars(bank.one(index)).items():
            assert (tensor - p[name]).norm() <= 1e-11 * p[name].norm(), name
            assert (name in trained) or torch.equal(tensor, getattr(start[index], name))


@pytest.mark.parametrize("kind", ["gated", "relu"])
def test_the_fast_bank_and_the_autograd_bank_take_the_same_steps(kind: str) -> None:
    start = [random_params(kind, 8, 20, seed) for seed in range(3)]
    banks = [made(start, torch.full((8,), 0.2), F64) for made in (FastBank, AutogradBank)]
    l1 = torch.tensor([0.0, 0.1, 0.3], dtype=F64)
    for step in range(1, 11):
        z = inputs(40, 8, step)
        adam = Adam(torch.tensor([1e-2, 0.0, 1e-3], dtype=F64), 0.999, 1e-8, step, True)
        one, other = (bank.step(z - bank.centre, l1, adam) for bank in banks)
        for name in ("squared_error", "auxiliary_error", "norm", "inner", "l0", "l1", "fired"):
            ran = torch.tensor([0, 2])  # what an SAE whose rate is 0 would have done is not asked
            torch.testing.assert_close(getattr(one, name)[ran], getattr(other, name)[ran], check_dtype=False)
    for index in range(3):
        for name, tensor in vars(banks[0].one(index)).items():
            torch.testing.assert_close(tensor, getattr(banks[1].one(index), name), rtol=1e-9, atol=1e-12)
    assert torch.equal(banks[1].one(1).W_enc, start[1].W_enc)  # a rate of 0


def test_the_autograd_bank_leaves_an_sae_with_a_nan_unchanged() -> None:
    start = [random_params("gated-untied", 8, 20, seed) for seed in range(2)]
    start[1].b_dec[3] = float("nan")
    bank = AutogradBank(start, torch.zeros(8), F64)
    adam = Adam(torch.tensor([1e-2, 1e-2], dtype=F64), 0.999, 1e-8, 1, False)
    batch = bank.step(inputs(30, 8), torch.tensor([0.1, 0.1], dtype=F64), adam)
    assert batch.loss(torch.zeros(2)).isfinite().tolist() == [True, False]
    assert not torch.equal(bank.one(0).W_enc, start[0].W_enc)
    assert torch.equal(bank.one(1).W_enc, start[1].W_enc)


SAELENS = {"gated-untied": "gsae_gated_untied", "relu": "standard"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_sae_gives_for_raw_rows_what_the_trained_one_gives_for_scaled_rows(
    tmp_path: Path, tiny_store: Store, kind: str
) -> None:
    trained, scale = random_params(kind, 32, 50, dtype=torch.float32), 7.5
    site = tiny_store.site("mlp.1").spec
    save_sae(tmp_path, trained, scale=scale, site=site, plan=tiny_store.plan, gsae=SAEMetadata(architecture=kind))
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == SAELENS.get(kind, "gated")
    sae = load_sae(tmp_path)
    z = inputs(400, 32).float()
    f, raw = trained.encode(z), sae.encode(z / scale)
    assert 0.05 < (f > 0).float().mean() < 0.95
    assert (raw * scale - f).norm() < 1e-5 * f.norm()
    x_hat = trained.decode(f)
    assert (sae.decode(raw) * scale - x_hat).norm() < 1e-5 * x_hat.norm()


@pytest.mark.parametrize("kind", ["gated", "relu", "gated-untied"])
def test_training_continues_from_a_saved_sae_as_exactly_as_float32_allows(
    tmp_path: Path, tiny_store: Store, kind: str
) -> None:
    trained, scale = random_params(kind, 32, 50, dtype=torch.float32), 0.0371
    site = tiny_store.site("mlp.1").spec
    save_sae(tmp_path, trained, scale=scale, site=site, plan=tiny_store.plan, gsae=SAEMetadata())
    again = ARCHITECTURES[kind].from_saved(load_sae(tmp_path).params)
    assert again is not None
    again = again.unfolded(scale)
    for name, tensor in vars(trained).items():
        if name in trained.BIASES:
            torch.testing.assert_close(getattr(again, name), tensor, rtol=2e-7, atol=0)
        else:
            assert torch.equal(getattr(again, name), tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_decoder_rows_are_folded_into_the_rest_and_change_no_reconstruction(kind: str) -> None:
    sae = random_params(kind, 7, 20)
    norms = torch.linspace(0.2, 5, 20, dtype=F64)
    norms[3] = 1
    sae.W_dec.mul_(norms[:, None])
    folded = sae.with_unit_rows()
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(20, dtype=F64))
    assert torch.equal(folded.W_enc[3], sae.W_enc[3])
    x = inputs(300, 7)
    f = sae.encode(x)
    assert (f > 0).double().mean() > 0.1
    torch.testing.assert_close(folded.encode(x), f * norms)
    torch.testing.assert_close(folded.decode(folded.encode(x)), sae.decode(f))
    again = random_params(kind, 7, 20, dtype=torch.float32).with_unit_rows()
    assert all(torch.equal(t, getattr(again, n)) for n, t in vars(again.with_unit_rows()).items())


def test_an_init_whose_decoder_has_other_norms_trains_as_the_folded_one_and_a_row_of_zeros_is_refused(
    tiny_store: Store, tmp_path: Path
) -> None:
    spec = tiny_store.site("mlp.1").spec
    sae = random_params("gated", 32, 24, dtype=torch.float32)
    for name, factor in (("unit", 1.0), ("long", 4.0), ("zero", 0.0)):
        other = ARCHITECTURES["gated"](**{n: t.clone() for n, t in vars(sae).items()})
        other.W_dec[5] *= factor
        if factor == 4:
            for tensor in (other.W_enc, other.b_gate, other.b_mag):
                tensor[5] /= factor
        save_sae(tmp_path / name, other, scale=1.0, site=spec, plan=tiny_store.plan, gsae=SAEMetadata())
    one, same = (
        load_sae(fit(tiny_store, tmp_path / f"from-{n}", f"gated width=24 l1=.2 init={tmp_path / n}")).params
        for n in ("unit", "long")
    )
    for name, tensor in vars(one).items():
        torch.testing.assert_close(getattr(same, name), tensor, rtol=1e-4, atol=1e-4)
    with pytest.raises(IncompatibleError, match=r"1 of the 24 rows of W_dec in .* are zero.*latent 5"):
        fit(tiny_store, tmp_path / "from-zero", f"gated width=24 l1=.2 init={tmp_path / 'zero'}")


@pytest.mark.parametrize("made", [FastBank, AutogradBank])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_r_mag_stays_where_its_exponential_is_harmless(made: Any, dtype: torch.dtype) -> None:
    start = [random_params("gated", 8, 20, 0, dtype)]
    paths = [{"path": "dense"}, {"path": "sparse"}] if made is FastBank else [{}]
    for more in paths:
        bank = made(start, torch.zeros(8), dtype, **more)
        bank.params["r_mag"][0, 4] = 9.9999
        bank.params["b_mag"][0, 4] = -1e5  # so that the derivative pulls it up
        bank.params["W_enc"][0, 4], bank.params["b_gate"][0, 4] = 100, 9.0
        adam = Adam(torch.tensor([0.1], dtype=dtype), 0.999, 1e-8, 1, True)
        bank.step(inputs(60, 8).abs().to(dtype) * 2, torch.tensor([0.1], dtype=F64), adam)
        assert bank.params["r_mag"].max() <= 10
        assert bank.params["r_mag"].isfinite().all()


def fit(store: Store, out: Path, *saes: str, **settings: Any) -> Path:
    usual = {"site": "mlp.1", "steps": 40, "batch_size": 128, "threads": 1, "device": "cpu"}
    config = RunConfig(**(usual | settings), saes=tuple(sae for line in saes for sae in parse_sae(line)))
    train(store.site("mlp.1"), config, out)
    return next((out / "saes").iterdir())


def test_rescale_shift_trains_only_the_magnitudes_of_a_baseline(tiny_store: Store, tmp_path: Path) -> None:
    baseline = fit(tiny_store, tmp_path / "relu", "relu width=40 l1=.5", steps=300, lr=3e-3)
    folder = fit(tiny_store, tmp_path / "run", f"rescale-shift width=40 init={baseline}", steps=300, lr=3e-3)
    before, after = load_sae(baseline), load_sae(folder)
    params: Any = after.params
    assert torch.equal(params.W_enc, before.params.W_enc)
    assert torch.equal(params.W_dec, before.params.W_dec)
    assert after.metadata["architecture"] == "rescale-shift"
    x = torch.cat([rows.float() for _, rows in tiny_store.site("mlp.1", "heldout").in_order()])
    gamma = []
    for sae in (before, after):
        x_hat = sae.decode(sae.encode(x))
        gamma.append(float(x_hat.square().sum() / (x_hat * x).sum()))
    assert gamma[0] < 0.95
    assert abs(gamma[1] - 1) < 0.3 * abs(gamma[0] - 1)


def test_fine_tuning_starts_from_the_saved_weights_and_names_what_does_not_fit(
    tiny_store: Store, tmp_path: Path
) -> None:
    first = fit(tiny_store, tmp_path / "first", "gated width=24 l1=.2")
    again = fit(tiny_store, tmp_path / "again", f"gated width=24 l1=.2 init={first} lr=1e-12", steps=1)
    for name, tensor in vars(load_sae(first).params).items():
        torch.testing.assert_close(getattr(load_sae(again).params, name), tensor, rtol=1e-6, atol=1e-9)
    assert load_sae(again).metadata["init_sha256"] == weights_sha256(first)
    with pytest.raises(IncompatibleError, match="has d_in 32 and width 24; 32 and 25 are needed"):
        fit(tiny_store, tmp_path / "wider", f"gated width=25 l1=.2 init={first}")
    with pytest.raises(IncompatibleError, match="A relu SAE cannot start from"):
        fit(tiny_store, tmp_path / "other", f"relu width=24 l1=.2 init={first}")
    with pytest.raises(NotFoundError, match="There is no SAE in"):
        fit(tiny_store, tmp_path / "nothing", f"gated width=24 l1=.2 init={tmp_path / 'no'}")
