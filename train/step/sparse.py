"""One exact training step of one SAE at the price of its encoder product and little more.

Every gradient of a Gated SAE lives on its open gates (Rajamanoharan et al. 2024, eq. 8: nothing passes a shut one),
and with beta1 = 0 a latent without gradient does not move under Adam: its second moment only decays, which is made up
for when it is next touched. So one list of open gates serves the whole step, and only the encoder product is dense:
2 * rows * d_in * d_sae flops where the dense step takes 7 times that, and about 12 * d_in for every open gate.
"""

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import adam as optim
from .adam import Adam
from .stack import Figures, Scratch, Stack

if TYPE_CHECKING:
    from .screening import Screen


def step(
    one: Stack, x: Tensor, centre: Tensor, l1_coefficient: float, adam: Adam, limit: int, passes: ModuleType,
    screen: "Screen | None", scratch: Scratch,
) -> Figures | None:  # fmt: skip
    """Take a step of one SAE on x (rows, d_in), the scaled inputs less `centre`; adam.lr () is its rate.

    Returns None, with nothing changed, where more than `limit` gates are open. Where the loss is not finite the SAE
    is left untouched. `passes` is `sparse_kernels` or `sparse_plain`; `screen`, if any, finds the open gates.
    """
    rows, d_sae = len(x), len(one.born)
    p, vectors = one.params, list(one.vectors().values())
    offset = p["b_dec"] - centre
    inputs = torch.sub(x, offset, out=scratch("inputs", tuple(x.shape), x.dtype))
    if screen is not None:
        opened = screen.open_gates(inputs, p["W_enc"], vectors[0], limit, scratch)
    else:
        pre = torch.mm(inputs, p["W_enc"].T, out=scratch("pre", (rows, d_sae), x.dtype))
        opened = passes.open_gates(pre, vectors[0], limit, scratch)
    if opened is None:
        return None
    errors = passes.rows_pass(opened, x, centre, offset, p["W_dec"], vectors, l1_coefficient / rows, scratch)
    figures = Figures.of(errors.sums, torch.zeros(d_sae, dtype=torch.int32))
    if not torch.isfinite(figures.loss(errors.sums.new_tensor(l1_coefficient))):
        return figures
    listed = passes.by_latent(opened, d_sae, scratch)
    through = passes.latents_pass(listed, errors, inputs, one, adam, figures.fired, scratch)
    if screen is not None:
        screen.refresh(p["W_enc"], listed)
    gradient, correction = errors.total - through, adam.correction(one.born.new_zeros(1)).to(x)
    moment, rate = one.moments["b_dec"][None], adam.lr.view(1)
    optim.adam_vector(p["b_dec"][None], gradient[None], moment, rate, adam.beta2, correction, adam.eps)
    return figures


def catch_up(one: Stack, beta2: float, at: int) -> None:
    """Bring every second moment to where it stands after step `at`, as the dense step expects it."""
    decay = (beta2 ** (at - one.stamps).double()).to(one.params["W_dec"])
    for name, moment in one.moments.items():
        if name != "b_dec":
            moment *= decay.view(-1, *[1] * (moment.dim() - 1))
    one.stamps.fill_(at)
