"""The list of features above 0 is what `encode` has above 0, to the bit, for every architecture that is saved."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.train import SAE, Firing
from gsae.train.architectures.registry import ARCHITECTURES

ARCHS = ("gated", "gated-untied", "relu")


def drawn(arch: str, d_in: int, d_sae: int, seed: int, bias: float) -> SAE:
    """An SAE of random weights; the larger the bias, the more latents fire."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {name: (d_sae, d_in) if name.startswith("W_") else (d_sae,) for name in ARCHITECTURES[arch].names()}
    params = {name: torch.randn(shape, generator=draw) for name, shape in (shapes | {"b_dec": (d_in,)}).items()}
    params[ARCHITECTURES[arch].GATE] += bias
    return SAE(ARCHITECTURES[arch](**params), {})


def assert_listed(sae: SAE, x: torch.Tensor, *, compiled: bool = True) -> None:
    firing = Firing(sae)
    firing.compiled = compiled
    wanted, found = sae.encode(x), firing(x)
    row, latents = torch.nonzero(wanted > 0, as_tuple=True)
    assert found.starts.tolist() == [0, *torch.bincount(row, minlength=len(x)).cumsum(0).tolist()]
    assert torch.equal(found.latents.long(), latents)
    assert torch.equal(found.values, wanted[row, latents])


@pytest.mark.parametrize("compiled", [True, False])
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(ARCHS), st.integers(1, 200), st.integers(0, 9), st.sampled_from([-9.0, -3.0, 0.0, 5.0]))
def test_it_is_what_encode_has_above_zero(compiled: bool, arch: str, d_sae: int, rows: int, bias: float) -> None:
    draw = torch.Generator().manual_seed(rows)
    assert_listed(drawn(arch, 12, d_sae, d_sae, bias), torch.randn(rows, 12, generator=draw), compiled=compiled)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_is_the_same_when_called_again_with_more_or_fewer_rows(arch: str) -> None:
    sae = drawn(arch, 12, 130, 1, -2.0)
    firing, draw = Firing(sae), torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, 12, generator=draw) for rows in (5, 70, 3)]
    lists = [firing(part) for part in parts]
    for part, found in zip(parts, lists, strict=True):  # none was overwritten by a later one
        wanted = sae.encode(part)
        assert torch.equal(found.values, wanted[wanted > 0])


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_not_a_number_does_not_fire(arch: str) -> None:
    sae = drawn(arch, 12, 70, 2, 1.0)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    x[1, 5] = torch.nan
    assert_listed(sae, x)
    bias = sae.params.b_dec.new_full((70,), torch.nan)
    assert_listed(SAE(replace(sae.params, **{ARCHITECTURES[arch].GATE: bias}), {}), x)
