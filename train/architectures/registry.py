"""The architectures there are, where an SAE starts, and how the scale of its inputs is folded in and out.

A new architecture is a file with a subclass of `Params` and one line in `PARAMS`. What is trained by the fast step
of `bank` is said in `FAST`; everything else is trained by `autograd`.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor

from gsae.errors import IncompatibleError

from .base import Params
from .gated import GatedParams, NoRMagParams, UnfrozenParams, UntiedParams
from .relu import ReluParams
from .rescale_shift import RescaleShiftParams

PARAMS: dict[str, type[Params]] = {
    "gated": GatedParams,
    "gated-untied": UntiedParams,
    "gated-no_r_mag": NoRMagParams,
    "gated-unfrozen": UnfrozenParams,
    "relu": ReluParams,
    "rescale-shift": RescaleShiftParams,
}
FAST = ("gated", "relu")


def names(arch: str) -> tuple[str, ...]:
    """The names of an architecture's parameters, in order."""
    return tuple(field.name for field in fields(PARAMS[arch]))


def initial(arch: str, d_in: int, d_sae: int, seed: int, scaled_mean: Tensor) -> Params:
    """The SAE a run starts from, float32 on the CPU, a function of its arguments alone.

    Decoder rows are random directions of unit norm and encoders equal the decoder, so a latent begins by reading
    what it writes; b_dec (d_in) is the mean of the scaled inputs; all else is 0.
    """
    directions = torch.randn(d_sae, d_in, generator=torch.Generator("cpu").manual_seed(seed))
    W_dec = directions / directions.norm(dim=1, keepdim=True)
    b_dec = scaled_mean.to("cpu", torch.float32, copy=True)
    others = {name: W_dec.clone() if name.startswith("W_") else torch.zeros(d_sae) for name in names(arch)}
    return PARAMS[arch](**(others | {"W_dec": W_dec, "b_dec": b_dec}))


def started_from(arch: str, trained: Params, scale: float, where: str) -> Params:
    """The SAE of an architecture that goes on from a saved one, for inputs times `scale`.

    `rescale-shift` starts from a baseline. Raises IncompatibleError, naming `where`, for another architecture.
    """
    found = {name: tensor.clone() for name, tensor in vars(trained).items()}
    if arch == "rescale-shift" and isinstance(trained, ReluParams):
        found |= {name: torch.zeros_like(trained.b_enc) for name in ("r_mag", "b_shift")}
    if sorted(found) != sorted(names(arch)):
        raise IncompatibleError(f"{where} has {', '.join(vars(trained))}: no start for a {arch} SAE.")
    start = PARAMS[arch](**found)
    return replace(start, **{name: (getattr(start, name).double() * scale).float() for name in start.BIASES})


def folded(params: Params, scale: float) -> Params:
    """The SAE that does to raw x what `params` does to scale * x: features times 1/scale, the same gates.

    Weights stay as they are (decoder rows keep unit norm), r_mag too; biases are divided by the scale.
    """
    return replace(params, **{name: getattr(params, name) / scale for name in params.BIASES})
