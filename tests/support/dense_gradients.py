"""The gradients of a dense step, and those of autograd through the formulas."""

import torch
from torch import Tensor

from gsae.train.architectures.base import Params
from gsae.train.step.batch_sums import BatchSums
from gsae.train.step.dense import Gradients
from gsae.train.step.fast_bank import FastBank


def gradients_of(bank: FastBank, x: Tensor, l1: Tensor) -> tuple[Gradients, BatchSums]:
    """The gradients of all SAEs of a bank at x, and the sums of the batch."""
    return bank.gradients(bank.stack, x, l1)[:2]


def by_autograd(sae: Params, z: Tensor, l1: float) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients of an SAE's loss in float64, by name, and the loss."""
    leaves = {name: getattr(sae, name).double().requires_grad_() for name in sae.names()}
    loss = type(sae)(**leaves).loss(z.double(), l1)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)), loss.detach()


def assert_gradients_equal(start: list[Params], z: Tensor, l1: Tensor, bank: FastBank, within: float) -> None:
    """Compare the gradients of a bank of the SAEs `start` with autograd's; errors are relative to all gradients."""
    gradients, batch = gradients_of(bank, z - bank.centre, l1)
    losses = batch.loss(l1) / len(z)
    for i, sae in enumerate(start):
        expected, loss = by_autograd(sae, z, float(l1[i]))
        own = {"W_enc": gradients.full_W_enc()[i], "W_dec": gradients.W_dec[i]}
        own |= {name: gradient[i] for name, gradient in gradients.vectors.items()}
        assert own.keys() == expected.keys()
        # Single gradients may cancel to nothing.
        whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        for name, gradient in expected.items():
            assert (own[name].double() - gradient).norm() <= within * whole, name
        assert abs(losses[i] - loss) <= within * loss
