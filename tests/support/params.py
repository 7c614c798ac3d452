"""SAEs with random parameters, and inputs for them."""

import torch
from torch import Tensor

from gsae.train.architectures.base import Params
from gsae.train.architectures.registry import ARCHITECTURES


def random_params(arch: str, d_in: int, d_sae: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Params:
    """An SAE as it may look in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    kind = ARCHITECTURES[arch]

    def noise(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    start = kind.initial(d_in, d_sae, seed, noise(d_in))
    moved = {n: getattr(start, n) + (0 if n == "W_dec" else noise(*getattr(start, n).shape)) for n in kind.names()}
    return kind(**{n: t.to(dtype) for n, t in moved.items()})


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal random numbers; those of two types are equal but for rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gate_of(sae: Params) -> Tensor:
    """The bias of an SAE that decides whether a latent fires."""
    bias: Tensor = getattr(sae, sae.GATE)
    return bias
