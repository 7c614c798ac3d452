"""The fused passes of a dense step, interpreted without a GPU: equal to their plain twins."""

import pytest
import torch
from torch import Tensor

from gsae.tests.support.devices import TRITON_DEVICE as DEVICE
from gsae.train.step import adam_plain, adam_triton, dense_plain, dense_triton, inputs_triton
from gsae.train.step.adam import Adam
from gsae.train.step.latent_vectors import GatedVectors, ReluVectors, Vectors

# In numpy, which interprets the kernels, what overflows or is no number is a warning.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

F32, BF16 = torch.float32, torch.bfloat16
ULP = {F32: 1e-5, BF16: 2**-7}  # the interpreter cuts bfloat16 off where a GPU rounds
SIZES = [(1, 3, 1, 3), (2, 9, 300, 130)]  # SAEs, latents, rows, d_in: no multiple of a block, and less than one


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def some_vectors(kind: str, saes: int, d_sae: int) -> Vectors:
    first, second, third = (0.3 * random(saes, d_sae) for _ in range(3))
    return GatedVectors(first, second, third) if kind == "gated" else ReluVectors(first)


def assert_close(found: object, expected: object, within: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=within, atol=within, equal_nan=True)


@pytest.mark.parametrize("kind", ["gated", "relu"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("planted", [0.0, float("nan"), float("inf")])
def test_the_passes_equal_their_plain_twins(
    kind: str, dtype: torch.dtype, size: tuple[int, int, int, int], planted: float
) -> None:
    saes, d_sae, rows, d_in = size
    torch.manual_seed(rows)
    vectors, copies = some_vectors(kind, saes, d_sae), 2 if kind == "gated" else 1
    pre, shift, l1 = random(saes, d_sae, rows).to(dtype), 0.1 * random(saes, d_sae), random(saes).abs()
    pre[0, 0, 0] += planted
    vectors.gate[:, 1] = -100  # a dead latent, and one that is always open
    vectors.gate[:, 2] = 100
    acts, own_acts = (torch.empty(copies, saes, d_sae, rows, dtype=dtype, device=DEVICE) for _ in range(2))
    assert_close(dense_triton.forward(pre, shift, vectors, own_acts), dense_plain.forward(pre, shift, vectors, acts))
    assert_close(own_acts, acts, ULP[dtype])

    recon, x, offset, centre = (
        random(copies, saes, rows, d_in).to(dtype),
        random(rows, d_in),
        random(saes, d_in),
        random(d_in),
    )
    recon[0, 0, 0, 0] += planted
    own_recon = recon.clone()
    assert_close(dense_triton.errors(own_recon, x, offset, centre), dense_plain.errors(recon, x, offset, centre))
    assert_close(own_recon, recon, ULP[dtype])

    own_pre = pre.clone()
    total, by_vectors = dense_plain.backward(pre, shift, vectors, acts, l1)
    own_total, own_by_vectors = dense_triton.backward(own_pre, shift, vectors, acts, l1)
    assert_close(own_pre, pre, ULP[dtype])
    assert_close(own_total, total)
    assert_close(vars(own_by_vectors), vars(by_vectors))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_are_scaled_and_centred_in_one_pass(dtype: torch.dtype) -> None:
    rows, centre = random(5, 130).to(dtype), random(130)
    x, spread = inputs_triton.centred(rows, 0.3, centre)
    expected = rows.float() * 0.3 - centre
    assert_close(x, expected, 1e-6)
    assert_close(spread, expected.double().square().sum(), 1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("row_clip", [True, False])
@pytest.mark.parametrize("planted", [1.0, float("nan"), 1e30])  # the square of the last is not finite
def test_adam_equals_its_plain_twin(dtype: torch.dtype, row_clip: bool, planted: float) -> None:
    saes, d_sae, d_in = 3, 5, 130
    torch.manual_seed(1)
    W = torch.nn.functional.normalize(random(saes, d_sae, d_in), dim=-1)
    grad, v = random(saes, d_sae, d_in).to(dtype), 1e-3 * random(saes, d_sae, d_in).square()
    v[0, 0] = 1e-9  # a row that the clip holds back
    grad[0, 1, 2] = planted
    correction, offset = random(saes, d_sae).abs() + 1, random(saes, d_in)
    adam = Adam(torch.tensor([1e-2, 0.0, 3e-3], device=DEVICE), 0.999, 1e-8, 7, row_clip)

    def after(step: str) -> list[Tensor]:
        weights, moments = W.clone(), v.clone()
        operand = weights.to(dtype) if dtype != F32 else weights
        steps = adam_triton if step == "triton" else adam_plain
        kept = steps.adam_decoder(weights, operand, grad, moments, adam, correction)
        decoded = weights.clone(), moments.clone()
        assert_close(operand, weights.to(operand), ULP[dtype])
        also = steps.adam_encoder(weights, operand, grad, correction, offset, moments, adam, correction)
        assert_close(operand, weights.to(operand), ULP[dtype])
        return [kept, *decoded, also, weights, moments]

    found, expected = after("triton"), after("plain")
    assert torch.equal(found[1][1], W[1])  # a rate of 0
    assert bool(found[0][0]) == (planted == 1.0)
    assert_close(found, expected, 1e-6)
