"""What a group trains: SAEs of one architecture and width with their optimiser state; and the choice of its step."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gsae.train.architectures.base import Params

from .adam import Adam
from .autograd_bank import AutogradBank
from .batch_sums import BatchSums
from .fast_bank import FAST, FastBank


class Bank(Protocol):
    """Parameters (saes, ...) by name, and the step that changes them."""

    params: dict[str, Tensor]

    @property
    def paths(self) -> tuple[str, ...]:
        """The step that each SAE takes next: "dense" or "sparse"."""

    @property
    def went(self) -> Tensor | None:
        """Whether the last step took place, () bool on the device; None where every step does.

        A step that did not has changed nothing, and its sums mean nothing.
        """

    def give_up(self, step: int, beta2: float) -> None:
        """Change what kept a step and all later ones from taking place, so that they can be taken again."""

    def look(self, step: int, rows: int) -> None:
        """Choose the next step's path by what the last one found; `step` does it itself where it knows its number.

        step: its number, which the device alone knows in a CUDA graph. rows: of its batch.
        """

    def one(self, index: int) -> Params:
        """One SAE, copied to the CPU."""

    def step(self, x: Tensor, l1_coefficients: Tensor, adam: Adam) -> BatchSums:
        """Take one training step on x (rows, d_in), the scaled inputs less their mean; l1_coefficients (saes,) float64.

        An SAE with a rate of 0, or with a loss that is not finite on this batch, is left unchanged; with a gradient
        that is not finite, the latents concerned are, and its sums are NaN.
        """

    def reset(self, sae: int, latents: Tensor) -> None:
        """Forget the moments of latents (n,) with new parameters; their bias correction starts again."""

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold; the tensors are those of the bank, not copies."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, bit for bit."""


def bank_for(
    start: Sequence[Params],
    centre: Tensor,
    device: torch.device,
    *,
    operands: torch.dtype,
    clip: float | None,
    screened: bool,
    tf32: bool,
    kernels: str | None,
    sparse_share: float | None,
) -> Bank:
    """The bank for SAEs of one architecture: the fast one if there is one and gradients are not clipped.

    start: the SAEs at step 0. centre (d_in): the mean of the scaled inputs. operands: the type of the operands of dense
    products. clip: the largest norm of all gradients of an SAE. screened: find open gates by a bfloat16 product.
    tf32: round the large products of float32 matrices on a GPU. kernels: of a GPU, "triton" or
    "plain". sparse_share: of gates that are open, up to which an SAE takes the sparse step; None for that of a CPU.
    """
    if type(start[0]) in FAST and clip is None and kernels == "triton":
        from .triton_bank import TritonBank  # Triton comes with torch for CUDA alone

        return TritonBank(start, centre, operands, device, sparse_share=sparse_share or 0.0, tf32=tf32)
    if type(start[0]) in FAST and clip is None:
        return FastBank(start, centre, operands, device, screened=screened, tf32=tf32)
    return AutogradBank(start, centre, operands, device, clip, tf32=tf32)
