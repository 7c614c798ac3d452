"""The formulas, and saved SAEs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gsae.train.architectures.base import Params
from gsae.train.architectures.gated import GatedParams
from gsae.train.architectures.registry import PARAMS, folded, initial, names


def random_params(arch: str, d_in: int, d_sae: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Params:
    """An SAE as it may look in the middle of training."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    start = initial(arch, d_in, d_sae, seed, noise(d_in))
    moved = {n: getattr(start, n) + (0 if n == "W_dec" else noise(*getattr(start, n).shape)) for n in names(arch)}
    return PARAMS[arch](**{n: t.to(dtype) for n, t in moved.items()})


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


def test_the_auxiliary_decoder_learns_nothing() -> None:
    sae = random_params("gated", 5, 9)
    W_dec, b_dec = sae.W_dec.requires_grad_(), sae.b_dec.requires_grad_()
    # With every magnitude at zero the main reconstruction is b_dec, so what is left for W_dec is the auxiliary's.
    shut = GatedParams(**{**vars(sae), "b_mag": torch.full((9,), -1e6, dtype=torch.float64)})
    x = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (shut.gates(x)[0] > 0).any()
    dW_dec, db_dec = torch.autograd.grad(shut.loss(x, 0.0), (W_dec, b_dec))
    assert dW_dec.abs().max() == 0
    assert db_dec.abs().max() > 0


@pytest.mark.parametrize("arch", ["gated", "relu"])
def test_training_starts_from_the_seed_alone(arch: str) -> None:
    mean = torch.arange(6.0)
    a, b, other = initial(arch, 6, 10, 3, mean), initial(arch, 6, 10, 3, mean), initial(arch, 6, 10, 4, mean)
    assert torch.equal(a.W_dec, b.W_dec)
    assert not torch.equal(a.W_dec, other.W_dec)
    assert torch.equal(a.W_enc, a.W_dec)
    assert torch.equal(a.b_dec, mean)
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(10))
    assert all(not getattr(a, name).any() for name in names(arch)[3:])


@pytest.mark.parametrize("arch", ["gated", "relu"])
@pytest.mark.parametrize("scale", [0.01, 37.0])
def test_folding_the_scale_changes_nothing_but_the_units(arch: str, scale: float) -> None:
    sae = random_params(arch, 16, 40)
    raw: Any = folded(sae, scale)
    z = torch.randn(300, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = z / scale
    f = sae.encode(z)
    assert 0.05 < (f > 0).double().mean() < 0.95
    torch.testing.assert_close(raw.encode(x) * scale, f, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(raw.decode(raw.encode(x)) * scale, sae.decode(f), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(raw.W_dec.norm(dim=1), torch.ones(40, dtype=torch.float64), rtol=1e-6, atol=0)
