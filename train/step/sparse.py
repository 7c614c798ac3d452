"""One exact training step of one SAE that costs its encoder product and little more.

Every gradient of a Gated SAE is at its open gates (Rajamanoharan et al. 2024, eq. 8: nothing passes a shut one). With
beta1 = 0 a latent without a gradient does not move under Adam; its second moment decays, which is made up for when the
latent is next touched. So one list of open gates serves the whole step, and only the encoder product is dense:
2 * rows * d_in * d_sae flops, a seventh of the dense step's, and about 12 * d_in for every open gate.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from .adam import Adam
from .adam_plain import adam_vector
from .batch_sums import BatchSums
from .buffers import Buffers
from .gate_lists import Derivatives, GatesByLatent, OpenGates
from .latent_vectors import Vectors
from .screening import Screen
from .stack import Stack


class SparsePasses(Protocol):
    """The passes over the open gates; `sparse_plain` and `sparse_numba` have them, the second documents them."""

    def open_gates(self, pre: Tensor, bias: Tensor, limit: int, buffers: Buffers) -> OpenGates | None:
        """List the open gates."""

    def rows_pass(
        self, opened: OpenGates, x: Tensor, centre: Tensor, offset: Tensor, W_dec: Tensor, vectors: Vectors, l1: float,
        buffers: Buffers,
    ) -> Derivatives:  # fmt: skip
        """Reconstruct the inputs and form the derivatives by the gates."""

    def by_latent(self, opened: OpenGates, d_sae: int, buffers: Buffers) -> GatesByLatent:
        """Sort the list by latent."""

    def latents_pass(
        self, listed: GatesByLatent, derivatives: Derivatives, x: Tensor, one: Stack, adam: Adam, fired: Tensor,
        buffers: Buffers,
    ) -> tuple[Tensor, bool]:  # fmt: skip
        """Take an Adam step for every latent in the list."""


def step(
    one: Stack, x: Tensor, centre: Tensor, l1_coefficient: float, adam: Adam, limit: int, passes: SparsePasses,
    screen: Screen | None, buffers: Buffers,
) -> BatchSums | None:  # fmt: skip
    """Take a step of one SAE on x (rows, d_in), the scaled inputs less `centre`; adam.lr () is its rate.

    Returns None, with nothing changed, if more than `limit` gates are open. If the loss is not finite, the SAE is left
    unchanged; if a gradient is not, the latents concerned are, and the sums are NaN. screen: finds the open gates, if
    given.
    """
    rows, d_sae = len(x), len(one.born)
    p, vectors = one.params, one.vectors()
    offset = p["b_dec"] - centre
    inputs = torch.sub(x, offset, out=buffers("inputs", tuple(x.shape), x.dtype))
    if screen is not None:
        opened = screen.open_gates(inputs, p["W_enc"], vectors.gate, limit, buffers)
    else:
        pre = torch.mm(inputs, p["W_enc"].T, out=buffers("pre", (rows, d_sae), x.dtype))
        opened = passes.open_gates(pre, vectors.gate, limit, buffers)
    if opened is None:
        return None
    derivatives = passes.rows_pass(opened, x, centre, offset, p["W_dec"], vectors, l1_coefficient / rows, buffers)
    batch = BatchSums.of(derivatives.sums, torch.zeros(d_sae, dtype=torch.int32))
    if not torch.isfinite(batch.loss(derivatives.sums.new_tensor(l1_coefficient))):
        return batch
    listed = passes.by_latent(opened, d_sae, buffers)
    through, finite = passes.latents_pass(listed, derivatives, inputs, one, adam, batch.fired, buffers)
    if screen is not None:
        screen.refresh(p["W_enc"], listed)
    gradient, correction = derivatives.total - through, adam.correction(one.born.new_zeros(1)).to(x)
    own = replace(adam, lr=adam.lr.view(1))
    kept = adam_vector(p["b_dec"][None], gradient[None], one.moments["b_dec"][None], own, correction)
    batch.spoil(~kept[0] | (not finite))
    return batch


def catch_up(one: Stack, beta2: float, at: int) -> None:
    """Let every second moment decay to its value after step `at`, as the dense step expects it."""
    decay = (beta2 ** (at - one.stamps).double()).to(one.params["W_dec"])
    for name, moment in one.moments.items():
        if name != "b_dec":
            moment *= decay.view(-1, *[1] * (moment.dim() - 1))
    one.stamps.fill_(at)
