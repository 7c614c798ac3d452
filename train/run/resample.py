"""New directions for latents that no longer fire: the resampling of Bricken et al. 2023, which the paper uses.

The direction of a silent latent becomes an input, drawn with probability proportional to its squared loss; its encoder
row has that direction and a fifth of the mean norm of live rows; its optimiser state starts again. Three things differ
from Bricken et al. Directions are those of x - b_dec, which the encoder reads. Rows of several times the median norm,
whose squared loss is most of the sum, are not drawn. And the bias is set so that the latent fires as often as the
median live latent, because with a bias of 0, their rule, it fires on about half of all rows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gsae.train.architectures.base import Params
from gsae.train.step.wide import wide

ENCODER_NORM = 0.2  # relative to the mean norm of the live encoder rows
ROWS_AT_ONCE, LATENTS_AT_ONCE = 1024, 256


@dataclass(frozen=True)
class Resampling:
    """Latents (n,) and their new parameters by name, (n, ...)."""

    latents: Tensor
    values: dict[str, Tensor]


def resampled(
    params: Params, silent: Tensor, z: Tensor, l1_coefficient: float, seed: int, *, zero_bias: bool,
    norm_limit: float = math.inf,
) -> Resampling | None:  # fmt: skip
    """What the silent latents (d_sae,) of an SAE become, given some of its inputs z (rows, d_in).

    Directions are drawn from inputs with a norm below `norm_limit`. At most as many latents are resampled as there are
    such inputs with a loss; None if there are none. A function of its arguments alone.
    """
    losses, fired = _losses(params, z, l1_coefficient)
    weights = torch.where(z.to(wide(z.device)).norm(dim=1) < norm_limit, losses.square(), 0)
    drawn = _draw(weights, int(silent.sum()), seed)
    if not len(drawn):
        return None
    latents = silent.nonzero()[: len(drawn), 0]
    live = ~silent if not silent.all() else silent
    directions = torch.nn.functional.normalize(z[drawn].to(params.W_dec) - params.b_dec, dim=1)
    encoder = directions * (ENCODER_NORM * params.W_enc[live].norm(dim=1).mean())
    gate = torch.zeros(len(drawn), device=z.device, dtype=params.b_dec.dtype)
    if not zero_bias:
        share = float(fired[live].to(wide(z.device)).median()) / len(z)
        gate = _bias(encoder, z.to(params.b_dec) - params.b_dec, share)
    values = {}
    for name in vars(params):
        if name.startswith("W_"):
            values[name] = directions if name == "W_dec" else encoder
        elif name != "b_dec":
            values[name] = gate if name == params.GATE else torch.zeros_like(gate)
    return Resampling(latents, values)


def _losses(params: Params, z: Tensor, l1_coefficient: float) -> tuple[Tensor, Tensor]:
    """The loss of each row (rows,), float64, and the number of rows on which each latent fires (d_sae,)."""
    losses, fired = [], torch.zeros(len(params.W_dec), dtype=torch.int64, device=z.device)
    for first in range(0, len(z), ROWS_AT_ONCE):
        x = z[first : first + ROWS_AT_ONCE].to(params.b_dec)
        terms = params.terms(x)
        losses.append(terms.losses(x, l1_coefficient).to(wide(z.device)))
        fired += (terms.f > 0).sum(0)
    return torch.cat(losses), fired


def _draw(weights: Tensor, count: int, seed: int) -> Tensor:
    """The numbers of `count` different rows, drawn in proportion to weights (rows,); fewer if fewer have a weight.

    They are the rows with the smallest exponential variates with these rates (Efraimidis and Spirakis 2006).
    """
    uniform = torch.rand(len(weights), dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(seed))
    keys = -torch.log(uniform.to(weights.dtype).to(weights.device)) / weights
    possible = int(((weights > 0) & torch.isfinite(weights)).sum())
    return torch.topk(torch.nan_to_num(keys, nan=torch.inf), min(count, possible), largest=False).indices


def _bias(encoder: Tensor, centred: Tensor, share: float) -> Tensor:
    """Biases (n,) with which encoder rows (n, d_in) are above 0 on that share of inputs (rows, d_in), or on one."""
    if len(centred) < 2:
        return torch.zeros(len(encoder), device=encoder.device, dtype=encoder.dtype)
    open_rows = min(max(1, round(share * len(centred))), len(centred) - 1)
    found = []
    for first in range(0, len(encoder), LATENTS_AT_ONCE):
        opened = encoder[first : first + LATENTS_AT_ONCE] @ centred.T
        highest = torch.topk(opened, open_rows + 1, dim=1).values
        found.append(-highest[:, -2:].mean(1))
    return torch.cat(found)
