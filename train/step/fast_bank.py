"""SAEs of one architecture and width, stacked, and one exact training step for all of them.

Each SAE takes the dense step or the sparse one, whichever costs less for the share of its gates that was open: training
begins with half of them open and ends with one in hundreds. The choice follows from the data alone, with some inertia,
and is part of the state. Neighbours on the dense path share their products.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gsae.train.architectures.base import Params
from gsae.train.architectures.gated import GatedParams
from gsae.train.architectures.relu import ReluParams

from . import adam_numba, adam_plain, dense, dense_numba, dense_plain, sparse, sparse_numba
from .adam import Adam, AdamSteps
from .batch_sums import BatchSums
from .buffers import Buffers
from .dense import DensePasses
from .latent_vectors import GatedVectors, ReluVectors, Vectors
from .screening import Screen
from .sparse import SparsePasses
from .stack import Stack

# The architectures that have a fast step, and the type of their parameters with one number for each latent.
FAST: dict[type[Params], type[Vectors]] = {GatedParams: GatedVectors, ReluParams: ReluVectors}
TAKEN_UP = 0.8  # share of the crossover below which an SAE changes to the sparse step


class FastBank:
    """A stack of SAEs: parameters in `params` as (saes, ...), second moments of the same shapes in `moments`."""

    def __init__(
        self, start: Sequence[Params], centre: Tensor, operands: torch.dtype, device: str | torch.device = "cpu",
        *, path: str | None = None, screened: bool = False, tf32: bool = False,
    ) -> None:  # fmt: skip
        """`start` are the SAEs at step 0, `centre` (d_in) is the mean of the scaled inputs.

        operands: type of the operands of dense products; weights keep the type of `start`. path: the step that all
        SAEs always take, "dense" or "sparse"; None for the one that costs less. On a GPU there is only the dense step.
        screened: the sparse step of float32 SAEs finds its open gates by a bfloat16 product, which is exact.
        tf32: a GPU rounds the large products of float32 matrices.
        """
        self.saes, self._params_type = len(start), type(start[0])
        self.kind = FAST[self._params_type]
        names = self._params_type.names()
        stacked = {name: torch.stack([getattr(one, name) for one in start]).to(device) for name in names}
        self.params: dict[str, Tensor] = stacked
        self.moments = {name: torch.zeros_like(tensor) for name, tensor in stacked.items()}
        self.d_sae, self.d_in = stacked["W_dec"].shape[1:]
        self.centre = centre.to(stacked["b_dec"])
        # The step after which the second moments of each latent began (0, or that of `reset`), and are up to date.
        self.born = torch.zeros(self.saes, self.d_sae, dtype=torch.int64, device=device)
        self.stamps = torch.zeros_like(self.born)
        self.steps = 0
        on_cpu = self.centre.device.type == "cpu"
        self.fixed = path if on_cpu else "dense"
        self.sparse = torch.full((self.saes,), self.fixed == "sparse")
        self.operands = {name: stacked[name].to(operands) for name in ("W_enc", "W_dec")}
        self._tf32 = tf32
        self._buffers, self._sparse_buffers = Buffers(self.centre.device), Buffers(self.centre.device)
        compiled = on_cpu and self.centre.dtype == torch.float32
        self.dense_passes: DensePasses = dense_numba if compiled else dense_plain
        self.adam_steps: AdamSteps = adam_numba if compiled else adam_plain
        self.sparse_passes: SparsePasses = sparse_numba  # in float64 too
        # The encoders of SAEs on the sparse path in bfloat16; dropped when anything else changes the weights.
        self.screened = screened and compiled
        self.screens: dict[int, Screen] = {}

    @property
    def stack(self) -> Stack:
        """Views of all SAEs."""
        return Stack(self.kind, self.params, self.moments, self.operands, self.born, self.stamps)

    @property
    def paths(self) -> tuple[str, ...]:
        """The step that each SAE takes next: "dense" or "sparse"."""
        return tuple("sparse" if sparse else "dense" for sparse in self.sparse.tolist())

    @property
    def went(self) -> Tensor | None:
        """As `Bank.went`: every step takes place."""
        return None

    def give_up(self, step: int, beta2: float) -> None:
        """As `Bank.give_up`, which is never called."""

    def look(self, step: int, rows: int) -> None:
        """As `Bank.look`, which is never called."""

    def one(self, index: int) -> Params:
        """One SAE, copied to the CPU."""
        return self._params_type(**{name: tensor[index].cpu().clone() for name, tensor in self.params.items()})

    # -- what a checkpoint holds

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold; the tensors are those of the bank, not copies."""
        moments = {f"{name}.second_moment": tensor for name, tensor in self.moments.items()}
        counters = {"born": self.born, "stamps": self.stamps, "sparse": self.sparse}
        return self.params | moments | counters | {"steps": torch.tensor(self.steps)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, bit for bit."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        self.steps = int(tensors["steps"])
        self._cast_weights()

    def reset(self, sae: int, latents: Tensor) -> None:
        """Forget the moments of latents (n,) with new parameters; their bias correction starts again."""
        for name, moment in self.moments.items():
            if name != "b_dec":
                moment[sae, latents] = 0
        self.born[sae, latents] = self.steps
        self._cast_weights()

    def _cast_weights(self, which: slice | int = slice(None)) -> None:
        """Update the operands of the dense products."""
        self.screens.clear()
        for name, operand in self.operands.items():
            if operand is not self.params[name]:
                operand[which].copy_(self.params[name][which])

    # -- the step

    def step(self, x: Tensor, l1_coefficients: Tensor, adam: Adam) -> BatchSums:
        """Take one training step on x (rows, d_in), the scaled inputs less `centre`; l1_coefficients (saes,) float64.

        An SAE with a rate of 0, or with a loss that is not finite on this batch, is left unchanged; with a gradient
        that is not finite, the latents concerned are, and its sums are NaN. On the CPU the sums of an SAE with a rate
        of 0 are NaN.
        """
        if self.centre.device.type != "cpu":
            batch, _ = self._dense(slice(None), x, l1_coefficients, adam)
        else:
            batch = BatchSums.unknown(self.saes, self.d_sae, x.device)
            running = adam.lr > 0
            for sae in (running & self.sparse).nonzero()[:, 0].tolist():
                self._sparse(sae, x, l1_coefficients, adam, batch)
            for some in neighbours((running & ~self.sparse).tolist()):
                own, opened = self._dense(some, x, l1_coefficients, adam)
                batch.put(some, own)
                if self.fixed is None:
                    self.sparse[some] |= opened <= TAKEN_UP * self.kind.CROSSOVER * len(x) * self.d_sae
            if self.sparse.all():
                self._buffers.free()  # those of the dense step are larger than the weights
        self.steps = int(adam.step)
        return batch

    def _dense(self, some: slice, x: Tensor, l1_coefficients: Tensor, adam: Adam) -> tuple[BatchSums, Tensor]:
        """Take the dense step; also return the number of open gates (saes,)."""
        stack, l1 = self.stack[some], l1_coefficients[some]
        gradients, batch, opened = self.gradients(stack, x, l1)
        rates = torch.where(torch.isfinite(batch.loss(l1)), adam.lr[some], 0)
        batch.spoil(~dense.update(stack, gradients, replace(adam, lr=rates), self.adam_steps))
        return batch, opened

    def gradients(self, stack: Stack, x: Tensor, l1: Tensor) -> tuple[dense.Gradients, BatchSums, Tensor]:
        """The gradients of some SAEs by the dense step, valid until the next; as `dense.gradients`."""
        return dense.gradients(stack, x, self.centre, l1, self.dense_passes, self._buffers, tf32=self._tf32)

    def _sparse(self, sae: int, x: Tensor, l1_coefficients: Tensor, adam: Adam, batch: BatchSums) -> None:
        """Take the sparse step; if too many gates are open, let the SAE take the dense one in this step."""
        one, own = self.stack[sae], replace(adam, lr=adam.lr[sae])
        if self.screened and sae not in self.screens:
            self.screens[sae] = Screen.of(one.params["W_enc"])
        share = 1.0 if self.fixed else self.kind.CROSSOVER
        limit = int(share * len(x) * self.d_sae)
        passes, l1 = (self.sparse_passes, self.screens.get(sae), self._sparse_buffers), float(l1_coefficients[sae])
        taken = sparse.step(one, x, self.centre, l1, own, limit, *passes)
        if taken is None:
            sparse.catch_up(one, adam.beta2, int(adam.step) - 1)
            self._cast_weights(sae)
            self.sparse[sae] = False
        else:
            batch.put(sae, taken)


def neighbours(chosen: list[bool]) -> Iterator[slice]:
    """The SAEs that were chosen, as slices of neighbours."""
    first = None
    for at, here in enumerate([*chosen, False]):
        if here and first is None:
            first = at
        elif not here and first is not None:
            yield slice(first, at)
            first = None
