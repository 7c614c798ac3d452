"""Screening in bfloat16 opens exactly the gates that float32 inner products open, in the hardest cases too."""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsae.tests.support.banks import bank_of, take_steps
from gsae.tests.support.banks import unit_params as random_params
from gsae.tests.support.params import gate_of
from gsae.tests.support.selection import mostly_slow
from gsae.train.step import sparse_numba
from gsae.train.step.buffers import Buffers
from gsae.train.step.fast_bank import FastBank
from gsae.train.step.screening import Screen
from gsae.train.step.vector_loops import dot

F32 = torch.float32


@numba.njit(error_model="numpy")
def inner_products(x, W, out):
    for r in range(len(x)):
        for i in range(len(W)):
            out[r, i] = dot(x[r], W, i)


def assert_the_same_gates(x: Tensor, W_enc: Tensor, bias: Tensor) -> None:
    a = torch.empty(len(x), len(W_enc))
    inner_products(x.numpy(), W_enc.numpy(), a.numpy())
    expected = ~(a + bias <= 0)
    opened = Screen.of(W_enc).open_gates(x, W_enc, bias, 1 << 30, Buffers(torch.device("cpu")))
    assert opened is not None
    rows = torch.repeat_interleave(torch.arange(len(x)), opened.starts.diff())
    found = torch.zeros_like(expected)
    found[rows, opened.latents.long()] = True
    assert torch.equal(found, expected)
    assert torch.equal(opened.values.nan_to_num(7), a[expected].nan_to_num(7))


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 9),
    d_in=st.sampled_from([1, 3, 16, 61, 300]),
    d_sae=st.sampled_from([1, 5, 64, 67, 130]),
    size=st.sampled_from([1e-30, 1e-20, 1e-6, 1.0, 1e6, 1e18]),
    weight=st.sampled_from([1e-20, 1.0, 1e6]),
    tie=st.sampled_from([0.0, 1e-7, 1e-3, 4e-3]),
    seed=st.integers(0, 2**31),
)
def test_thresholds_at_the_values_themselves(
    rows: int, d_in: int, d_sae: int, size: float, weight: float, tie: float, seed: int
) -> None:
    # Every latent's threshold lies at, or within a bfloat16 step of, what one of the rows gives it.
    x, W_enc = size * noise(rows, d_in, seed=seed), weight * noise(d_sae, d_in, seed=seed + 1)
    a = torch.empty(rows, d_sae)
    inner_products(x.numpy(), W_enc.numpy(), a.numpy())
    aimed = a[torch.arange(d_sae) % rows, torch.arange(d_sae)]
    assert_the_same_gates(x, W_enc, -aimed * (1 + tie * noise(d_sae, seed=seed + 2)))


@pytest.mark.parametrize("d_in", [64, 576])
def test_terms_that_cancel(d_in: int) -> None:
    # Large terms of both signs, of which bfloat16 keeps 8 bits, leave a small sum that decides.
    x = 1e4 * noise(40, d_in, seed=0)
    x[:, d_in // 2 :] = -x[:, : d_in // 2]
    W_enc = noise(100, d_in, seed=1)
    W_enc[:, d_in // 2 :] = W_enc[:, : d_in // 2] * (1 + 1e-6 * noise(100, d_in // 2, seed=2))
    assert_the_same_gates(x, W_enc, torch.zeros(100))
    assert_the_same_gates(x, W_enc, 1e-3 * noise(100, seed=3))


def test_rows_of_huge_norm_and_rows_that_are_not_numbers() -> None:
    x, W_enc, bias = noise(12, 50, seed=0), noise(90, 50, seed=1), noise(90, seed=2) - 8
    x[1] *= 1e20
    x[2] *= 3e38 / x[2].abs().max()
    x[3, 7] = torch.inf
    x[4, 7] = -torch.inf
    x[5, 7] = torch.nan
    x[6] = 0
    x[7, ::2] = 1e-40
    W_enc[3] *= 1e20
    W_enc[4, 4] = torch.nan
    W_enc[5] = 0
    bias[6], bias[7] = torch.inf, -torch.inf
    assert_the_same_gates(x, W_enc, bias)


def test_values_just_over_and_under_a_bfloat16_step() -> None:
    # 1 + 2^-8 is half way between two neighbours; next to it rounding goes one way or the other.
    near = np.nextafter(np.float32(1 + 2**-8), np.float32([0, 2]))
    x = torch.tensor([[near[0]], [near[1]], [1 + 2**-8], [-near[0]], [-near[1]]])
    W_enc = torch.tensor([[1.0], [-1.0], [near[0]], [near[1]]])
    for threshold in (1.0, *map(float, near), 1 + 2**-7):
        for sign in (1, -1):
            assert_the_same_gates(x, W_enc, torch.full((4,), sign * threshold))


def test_few_gates_need_a_float32_product_and_are_shut() -> None:
    x, W_enc = noise(200, 576, seed=0), torch.nn.functional.normalize(noise(1000, 576, seed=1))
    buffers = Buffers(torch.device("cpu"))
    opened = Screen.of(W_enc).open_gates(x, W_enc, torch.full((1000,), -2.6), 1 << 30, buffers)
    assert opened is not None
    assert len(opened.latents) < int(buffers("maybe", (201,), torch.int64)[-1]) < 1.5 * len(opened.latents)


@pytest.mark.parametrize("arch", mostly_slow(["gated", "relu"], "gated"))
def test_a_screened_training_is_the_unscreened_one_up_to_rounding(arch: str) -> None:
    start = [random_params(arch, 12, 200, i, F32) for i in range(2)]
    for sae in start:
        gate_of(sae).sub_(5)
    banks = [FastBank(start, bank_of(start, sparse_numba).centre, F32, screened=screened) for screened in (False, True)]
    for bank in banks:
        take_steps(bank, range(1, 21))
    assert banks[1].paths == ("sparse", "sparse")
    assert len(banks[1].screens) == 2
    for name, expected in banks[0].params.items():
        assert (banks[1].params[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_a_restored_or_reset_bank_screens_with_its_new_weights() -> None:
    start = [random_params("gated", 12, 200, 0, F32)]
    start[0].b_gate.sub_(5)
    whole, first, second = (FastBank(start, torch.zeros(12), F32, path="sparse", screened=True) for _ in range(3))
    for bank, steps in ((whole, range(1, 8)), (first, range(1, 8)), (second, range(1, 3))):
        take_steps(bank, steps)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    for bank in (whole, second):
        bank.params["W_enc"][0, 5] = 2.0
        bank.reset(0, torch.tensor([5]))
        take_steps(bank, range(8, 12))
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name
