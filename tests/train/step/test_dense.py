"""The hand-written step against autograd through the formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsae.tests.support.dense_gradients import assert_gradients_equal, gradients_of
from gsae.tests.support.params import gate_of, normal, random_params
from gsae.tests.support.selection import mostly_slow
from gsae.train.architectures.base import Params
from gsae.train.step import dense_numba, dense_plain
from gsae.train.step.adam import Adam
from gsae.train.step.compiling import kernel_threads
from gsae.train.step.fast_bank import FastBank

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def bank_of(start: list[Params], operands: torch.dtype, *, compiled: bool) -> FastBank:
    centre = torch.linspace(-0.2, 0.3, start[0].W_dec.shape[1], dtype=start[0].W_dec.dtype)
    bank = FastBank(start, centre, operands)
    if not compiled:
        bank.dense_passes = dense_plain
    assert (bank.dense_passes is dense_numba) == compiled
    return bank


@pytest.mark.parametrize("arch", ["gated", "relu"])
@settings(deadline=None, max_examples=40)
@given(
    rows=st.sampled_from([1, 2, 17, 64]),
    d_in=st.integers(1, 20),
    d_sae=st.integers(1, 40),
    saes=st.integers(1, 3),
    bias=st.sampled_from([-9.0, -1.0, 0.0, 9.0]),
    seed=st.integers(0, 2**31),
)
def test_all_gradients_equal_autograd_in_float64(
    arch: str, rows: int, d_in: int, d_sae: int, saes: int, bias: float, seed: int
) -> None:
    # A bias of -9 shuts every gate, 9 opens all; the rows of one batch may be a single one.
    start = [random_params(arch, d_in, d_sae, seed + i) for i in range(saes)]
    for sae in start:
        gate_of(sae)[::2] += bias
    l1 = torch.linspace(0, 0.7, saes, dtype=F64)
    bank = bank_of(start, F64, compiled=False)
    assert_gradients_equal(start, normal(rows, d_in, seed=seed), l1, bank, 1e-12)


@pytest.mark.parametrize("arch", ["gated", "relu"])
@pytest.mark.parametrize(("rows", "d_in", "d_sae"), [(1, 3, 5), (50, 19, 37), (129, 32, 64)])
def test_the_compiled_step_gives_autograds_gradients_in_float32(arch: str, rows: int, d_in: int, d_sae: int) -> None:
    start = [random_params(arch, d_in, d_sae, i, F32) for i in range(3)]
    l1 = torch.tensor([0.0, 0.1, 0.5], dtype=F64)
    bank = bank_of(start, F32, compiled=True)
    assert_gradients_equal(start, normal(rows, d_in, dtype=F32), l1, bank, 1e-5)


@pytest.mark.parametrize("arch", mostly_slow(["gated", "relu"], "gated"))
def test_with_bfloat16_products_compiled_and_plain_differ_by_rounding_alone(arch: str) -> None:
    start = [random_params(arch, 32, 64, i, F32) for i in range(2)]
    l1, z = torch.tensor([0.1, 0.2], dtype=F64), normal(128, 32, dtype=F32)
    plain, compiled = (bank_of(start, BF16, compiled=c) for c in (False, True))
    (expected, a), (own, b) = (gradients_of(bank, z - bank.centre, l1) for bank in (plain, compiled))
    assert torch.equal(a.fired, b.fired)
    torch.testing.assert_close(own.full_W_enc(), expected.full_W_enc(), rtol=0.02, atol=1e-3)
    torch.testing.assert_close(own.W_dec, expected.W_dec, rtol=0.02, atol=1e-3)
    for name, gradient in expected.vectors.items():
        torch.testing.assert_close(own.vectors[name], gradient, rtol=0.02, atol=1e-3)
    # And both lie as near to float32 as rounding operands to 8 bits allows.
    exact = gradients_of(bank_of(start, F32, compiled=True), z - plain.centre, l1)[0].full_W_enc()
    assert (own.full_W_enc() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("operands", [F32, BF16])
def test_batch_sums_are_sums_over_the_batch(compiled: bool, operands: torch.dtype) -> None:
    sae = random_params("gated", 24, 50, 1, F32)
    bank = bank_of([sae], operands, compiled=compiled)
    z = normal(100, 24, dtype=F32)
    _, batch = gradients_of(bank, z - bank.centre, torch.tensor([0.1], dtype=F64))
    f = sae.encode(z)
    x_hat = sae.decode(f)
    near = {"rtol": 1e-5 if operands == F32 else 0.02, "atol": 0.0, "check_dtype": False}
    torch.testing.assert_close(batch.squared_error[0], (x_hat - z).square().sum(), **near)
    torch.testing.assert_close(batch.norm[0], x_hat.square().sum(), **near)
    torch.testing.assert_close(batch.inner[0], (x_hat * z).sum(), **near)
    torch.testing.assert_close(batch.l1[0], torch.relu(sae.gates(z)[0]).sum(), **near)
    torch.testing.assert_close(batch.l0[0], (f > 0).sum(), **near)


@pytest.mark.parametrize("arch", ["gated", "relu"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec", "bias"])
def test_a_nan_anywhere_makes_the_loss_not_finite(arch: str, compiled: bool, name: str) -> None:
    start = [random_params(arch, 8, 16, i, F32) for i in range(2)]
    getattr(start[1], start[1].GATE if name == "bias" else name).view(-1)[3] = float("nan")
    bank = bank_of(start, F32, compiled=compiled)
    _, batch = gradients_of(bank, normal(40, 8, dtype=F32), torch.tensor([0.1, 0.1], dtype=F64))
    loss = batch.squared_error + batch.auxiliary_error + batch.l1
    assert loss[0].isfinite()
    assert not loss[1].isfinite()


@pytest.mark.parametrize("arch", ["gated", "relu"])
@pytest.mark.parametrize("tf32", [False, True])
def test_only_the_large_products_of_a_step_may_be_rounded_to_tf32(
    arch: str, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, d_in, d_sae, seen = 16, 6, 24, list[tuple[int, bool]]()

    def watched(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def multiply(a: Tensor, b: Tensor, **more: Any) -> Tensor:
            seen.append((a.numel() * b.shape[-1], torch.backends.cuda.matmul.allow_tf32))
            return product(a, b, **more)

        return multiply

    for name in ("mm", "bmm"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
    bank = FastBank([random_params(arch, d_in, d_sae, 0, torch.float32)], torch.zeros(d_in), torch.float32, tf32=tf32)
    bank.step(normal(rows, d_in).float(), torch.tensor([0.1]), Adam(torch.tensor([1e-3]), 0.999, 1e-8, 1, True))
    large = [allowed for size, allowed in seen if size == rows * d_in * d_sae]
    small = [allowed for size, allowed in seen if size < rows * d_in * d_sae]
    assert (large, small) == ([tf32] * bank.one(0).PRODUCTS, [False] * 2)
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit_of_the_compiled_passes(operands: torch.dtype) -> None:
    start = [random_params("gated", 33, 150, seed, torch.float32) for seed in range(2)]
    states = []
    for threads in (1, 2):
        with kernel_threads(threads):
            bank = bank_of(start, operands, compiled=True)
            for step in range(1, 6):
                adam = Adam(torch.tensor([1e-3, 0.02]), 0.999, 1e-8, step, row_clip=True)
                bank.step(normal(70, 33, seed=step).float(), torch.tensor([0.1, 0.3]), adam)
        states.append(bank.state())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
