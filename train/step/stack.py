"""What both kinds of step work on and return: views of SAEs side by side, the figures of a batch, and buffers."""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """Views of SAEs of one architecture: parameters and second moments (saes, ...), changed in place.

    operands: W_enc and W_dec in the type of the dense products, the parameters themselves where that is theirs. born
    (saes, d_sae): after which step each latent's second moments began; stamps: after which step they stand.
    """

    params: dict[str, Tensor]
    moments: dict[str, Tensor]
    operands: dict[str, Tensor]
    born: Tensor
    stamps: Tensor

    def vectors(self) -> dict[str, Tensor]:
        """The parameters of one number a latent."""
        return {name: tensor for name, tensor in self.params.items() if name not in ("W_enc", "W_dec", "b_dec")}

    def __getitem__(self, which: slice | int) -> "Stack":
        """Some of the SAEs, or one, whose tensors then lack the first dimension."""
        params, moments, operands = (
            {name: tensor[which] for name, tensor in kind.items()}
            for kind in (self.params, self.moments, self.operands)
        )
        return Stack(params, moments, operands, self.born[which], self.stamps[which])


@dataclass(frozen=True)
class Figures:
    """Sums over the rows of a batch, on the bank's device; float64 (saes,), save `fired` (saes, d_sae) int32."""

    squared_error: Tensor
    auxiliary_error: Tensor
    norm: Tensor  # ||x_hat||^2
    inner: Tensor  # x_hat . x
    l0: Tensor
    l1: Tensor  # of relu(pi_gate), or of the baseline's features
    fired: Tensor  # rows that each latent fired on

    def loss(self, l1_coefficients: Tensor) -> Tensor:
        """Eq. 8 (or 4), summed over the rows (saes,)."""
        return self.squared_error + self.auxiliary_error + l1_coefficients * self.l1

    @classmethod
    def of(cls, sums: Tensor, fired: Tensor) -> "Figures":
        """From the sums, in order, and `fired`."""
        error, auxiliary, norm, inner, l0, l1 = sums
        return cls(error, auxiliary, norm, inner, l0, l1, fired)

    @classmethod
    def none(cls, saes: int, d_sae: int) -> "Figures":
        """NaN everywhere, on the CPU: no step was taken."""
        numbers = torch.full((len(fields(cls)) - 1, saes), float("nan"), dtype=torch.float64)
        return cls.of(numbers, torch.zeros(saes, d_sae, dtype=torch.int32))

    def put(self, which: slice | int, others: "Figures") -> None:
        """Take over the figures of some SAEs, or of one."""
        for each in fields(self):
            getattr(self, each.name)[which] = getattr(others, each.name)


@dataclass(frozen=True)
class Scratch:
    """Buffers kept from step to step, by name, on one device: fresh memory costs a page fault every 4 KiB."""

    device: torch.device
    kept: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until the name is asked for again."""
        size = int(torch.Size(shape).numel())
        flat = self.kept.get((name, dtype))
        if flat is None or len(flat) < size:
            grown = size + size // 4 if flat is not None else size
            self.kept[name, dtype] = flat = torch.empty(grown, dtype=dtype, device=self.device)
        return flat[:size].view(shape)
