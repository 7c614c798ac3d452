"""Adam without a first moment, projected gradients, unit-norm decoder rows."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from gsae.tests.support.params import normal, random_params
from gsae.tests.support.row_clip import step_with_row_clip
from gsae.tests.support.selection import mostly_slow
from gsae.train.architectures.base import Params
from gsae.train.step import adam_numba, adam_plain
from gsae.train.step.adam import Adam
from gsae.train.step.fast_bank import FastBank

SAES, D_SAE, D_IN = 2, 13, 9
IMPLEMENTATIONS = [adam_plain, adam_numba]


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=seed, dtype=dtype)


def unit_rows(dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.normalize(noise(SAES, D_SAE, D_IN, seed=0, dtype=dtype), dim=-1)


def rates_of(adam: Adam) -> tuple[Adam, Tensor]:
    return adam, adam.correction(torch.zeros(SAES, D_SAE)).to(adam.lr)


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize("large", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("row_clip", [False, True])
def test_a_row_whose_gradient_or_its_square_is_not_finite_keeps_its_weights_and_is_reported(
    module: ModuleType, large: float, row_clip: bool
) -> None:
    W, E = unit_rows(torch.float32), unit_rows(torch.float32)
    before = W.clone()
    grad = noise(SAES, D_SAE, D_IN, seed=1)
    grad[1, 4, 2] = large
    adam, ones = Adam(torch.full((SAES,), 1e-3), 0.999, 1e-8, 1, row_clip), torch.ones(SAES, D_SAE)
    zeros = torch.zeros(SAES, D_SAE), torch.zeros(SAES, D_IN)
    found = module.adam_decoder(W, W, grad, torch.zeros_like(W), adam, ones)
    other = module.adam_encoder(E, E, grad, *zeros, torch.zeros_like(E), adam, ones)
    assert found.tolist() == other.tolist() == [True, False]
    for matrix in (W, E):
        moved = ~(matrix == before).all(-1)
        assert moved.sum() == SAES * D_SAE - 1
        assert not moved[1, 4]
        assert matrix.isfinite().all()


@pytest.mark.parametrize("row_clip", [False, True])
def test_two_hundred_steps_equal_torchs_adam_with_projection_and_renormalisation(row_clip: bool) -> None:
    start = {"W_dec": unit_rows(torch.float64), "W_enc": unit_rows(torch.float64)}
    start["b_gate"] = torch.zeros(SAES, D_SAE, dtype=torch.float64)
    own, v = {n: t.clone() for n, t in start.items()}, {n: torch.zeros_like(t) for n, t in start.items()}
    theirs = {n: t.clone() for n, t in start.items()}
    oracle = torch.optim.Adam(theirs.values(), lr=3e-3, betas=(0.0, 0.999), eps=1e-8)
    bounded = 0
    lr = torch.full((SAES,), 3e-3, dtype=torch.float64)
    offset = noise(SAES, D_IN, seed=1, dtype=torch.float64)
    for step in range(1, 201):
        shape = SAES, D_SAE, D_IN
        grad = {"W_dec": noise(*shape, seed=3 * step), "W_enc": noise(*shape, seed=3 * step + 1)}
        grad = {name: g.double() * (noise(*shape, seed=10**6 + step) > 0.5) for name, g in grad.items()}
        sums = noise(SAES, D_SAE, seed=3 * step + 2, dtype=torch.float64)
        rates = rates_of(Adam(lr, 0.999, 1e-8, step, row_clip))
        adam_plain.adam_decoder(own["W_dec"], own["W_dec"], grad["W_dec"], v["W_dec"], *rates)
        adam_plain.adam_encoder(own["W_enc"], own["W_enc"], grad["W_enc"], sums, offset, v["W_enc"], *rates)
        adam_plain.adam_vector(own["b_gate"], sums, v["b_gate"], *rates)

        along = (grad["W_dec"] * theirs["W_dec"]).sum(-1, keepdim=True)
        theirs["W_dec"].grad = grad["W_dec"] - along * theirs["W_dec"]
        theirs["W_enc"].grad = grad["W_enc"] - torch.einsum("sf,sd->sfd", sums, offset)
        theirs["b_gate"].grad = sums
        if row_clip:
            bounded += step_with_row_clip(oracle, theirs, 3e-3)
        else:
            oracle.step()
        theirs["W_dec"] /= theirs["W_dec"].norm(dim=-1, keepdim=True)
    assert not row_clip or bounded > 300
    for name in start:
        assert (own[name] - theirs[name]).norm() <= 1e-12 * theirs[name].norm(), name


@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_clip", mostly_slow([False, True], True))
def test_compiled_and_plain_adam_agree(operands: torch.dtype, row_clip: bool) -> None:
    results = []
    for module in IMPLEMENTATIONS:
        W, E = unit_rows(torch.float32), unit_rows(torch.float32)
        cast = W.to(operands, copy=operands != torch.float32), E.to(operands, copy=operands != torch.float32)
        v, u = torch.zeros_like(W), torch.zeros_like(E)
        for step in range(1, 6):
            lr = torch.tensor([1e-3, 0.02])
            rates = rates_of(Adam(lr, 0.999, 1e-8, step, row_clip))
            grad = noise(SAES, D_SAE, D_IN, seed=step).to(operands)
            module.adam_decoder(W, cast[0], grad, v, *rates)
            module.adam_encoder(E, cast[1], grad, W[..., 0].clone(), W[:, 0].clone(), u, *rates)
        results.append((W, E, v, u, cast[0].float(), cast[1].float()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if operands != torch.float32 else 1e-5, atol=1e-5)
    torch.testing.assert_close(results[1][4], results[1][0].to(operands).float(), rtol=0, atol=0)


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
def test_a_rate_of_zero_touches_nothing_whatever_the_gradient(module: ModuleType) -> None:
    W, E = unit_rows(torch.float32), unit_rows(torch.float32)
    v, u = torch.ones_like(W), torch.ones_like(E)
    before = [t.clone() for t in (W, E, v, u)]
    lr = torch.tensor([0.0, 1e-3])
    grad = noise(SAES, D_SAE, D_IN, seed=1)
    grad[0] = float("nan")
    rates = Adam(lr, 0.999, 1e-8, 1, row_clip=True), torch.ones(SAES, D_SAE)
    module.adam_decoder(W, W, grad, v, *rates)
    module.adam_encoder(E, E, grad, torch.zeros(SAES, D_SAE), torch.zeros(SAES, D_IN), u, *rates)
    for now, was in zip((W, E, v, u), before, strict=True):
        assert torch.equal(now[0], was[0])
        assert not torch.equal(now[1], was[1])
        assert now.isfinite().all()


@pytest.mark.parametrize("arch", mostly_slow(["gated", "relu"], "gated"))
@pytest.mark.parametrize("operands", mostly_slow([torch.float32, torch.bfloat16], torch.float32))
def test_decoder_rows_have_unit_norm_after_every_step(arch: str, operands: torch.dtype) -> None:
    start: list[Params] = [random_params(arch, 12, 30, i, torch.float32) for i in range(2)]
    bank = FastBank(start, torch.zeros(12), operands)
    lr, l1 = torch.tensor([0.1, 1e-3]), torch.tensor([0.1, 0.3], dtype=torch.float64)
    for step in range(1, 11):
        bank.step(noise(64, 12, seed=step), l1, Adam(lr, 0.999, 1e-8, step, False))
        norms = bank.params["W_dec"].norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=0)
    assert not torch.equal(bank.params["W_dec"][0], start[0].W_dec)
