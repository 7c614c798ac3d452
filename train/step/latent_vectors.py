"""The parameters with one number for each latent, by name: the architectures that have a fast step differ in these.

The fast step dispatches on the type. Gradients of these parameters have the same type.
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from torch import Tensor

LARGEST = {"r_mag": 10.0}  # of parameters: exp(r_mag) overflows above 88, and a trained one is below 1


def largest(name: str) -> float:
    """What no entry of a parameter may exceed; every step keeps to it."""
    return LARGEST.get(name, inf)


@dataclass(frozen=True)
class GatedVectors:
    """Those of a Gated SAE, (d_sae,) or, of a stack, (saes, d_sae)."""

    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor

    RECONSTRUCTIONS: ClassVar[int] = 2  # that the loss has: the main one and the auxiliary one
    # Share of open gates up to which the sparse step costs less than the dense one (bench/step.py).
    CROSSOVER: ClassVar[float] = 0.16

    @property
    def gate(self) -> Tensor:
        """The bias of the gates."""
        return self.b_gate


@dataclass(frozen=True)
class ReluVectors:
    """That of the baseline, (d_sae,) or, of a stack, (saes, d_sae)."""

    b_enc: Tensor

    RECONSTRUCTIONS: ClassVar[int] = 1
    CROSSOVER: ClassVar[float] = 0.13

    @property
    def gate(self) -> Tensor:
        """The bias of the gates: a latent is open where its feature is above 0."""
        return self.b_enc


Vectors = GatedVectors | ReluVectors
