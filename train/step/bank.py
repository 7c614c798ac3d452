"""SAEs of one architecture and width, stacked, and one exact training step for all of them.

Each SAE takes the dense step or the sparse one, whichever is cheaper for the share of its gates that was open:
training begins with half of them open and ends with one in hundreds. The choice follows from the data alone, with
some inertia, and is part of the bank's state. Neighbours on the dense path share their products.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gsae.train.architectures.base import Params
from gsae.train.architectures.registry import PARAMS, names

from . import adam as optim
from . import dense, sparse, sparse_plain
from . import dense_plain as elementwise
from .adam import Adam
from .stack import Figures, Scratch, Stack

try:
    from . import dense_numba as kernels
    from . import screening
    from . import sparse_numba as sparse_kernels
except ImportError:  # without numba everything works, slower
    kernels = screening = sparse_kernels = None  # type: ignore[assignment]

# Share of open gates up to which the sparse step is the cheaper one (bench/step.py), and that at which it is taken up.
CROSSOVER = {"gated": 0.16, "relu": 0.13}
TAKEN_UP = 0.8  # of the crossover


def kernel_threads(count: int) -> AbstractContextManager[None]:
    """Let the compiled functions, if there are any, use so many threads."""
    return kernels.threads(count) if kernels is not None else nullcontext()


def screening_pays() -> bool:
    """Whether this CPU multiplies bfloat16 several times faster than float32."""
    return kernels is not None and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Bank:
    """A stack of SAEs: parameters in `params` as (saes, ...), second moments of the same shapes in `moments`."""

    def __init__(
        self, arch: str, start: list[Params], centre: Tensor, operands: torch.dtype, device: str | torch.device = "cpu",
        *, path: str | None = None, screened: bool = False,
    ) -> None:  # fmt: skip
        """`start` are the SAEs at step 0, `centre` (d_in) the mean of the scaled inputs.

        `operands` is the type of the dense products' operands; weights stay in the type of `start`. `path` ("dense"
        or "sparse") is the step that all take for good; None, the cheaper one. A GPU has the dense one only.
        `screened` lets the sparse step find its gates by a bfloat16 product, which is exact, where numba is there.
        """
        self.arch, self.saes = arch, len(start)
        stacked = {name: torch.stack([getattr(one, name) for one in start]).to(device) for name in names(arch)}
        self.params: dict[str, Tensor] = stacked
        self.moments = {name: torch.zeros_like(tensor) for name, tensor in stacked.items()}
        self.d_sae, self.d_in = stacked["W_dec"].shape[1:]
        self.centre = centre.to(stacked["b_dec"])
        # After which step each latent's second moments began (0, or when `reset` was called), and stand.
        self.born = torch.zeros(self.saes, self.d_sae, dtype=torch.int64, device=device)
        self.stamps = torch.zeros_like(self.born)
        self.steps = 0
        self.fixed = "dense" if self.centre.device.type != "cpu" else path
        self.sparse = torch.full((self.saes,), self.fixed == "sparse")
        self.operands = {name: stacked[name].to(operands) for name in ("W_enc", "W_dec")}
        self.scratch, self._sparse_scratch = Scratch(self.centre.device), Scratch(self.centre.device)
        compilable = kernels is not None and centre.dtype == torch.float32
        # Of SAEs on the sparse path: their encoders in bfloat16, made anew whenever anything but that path moved them.
        self.screened = screened and compilable
        self.screens: dict[int, Any] = {}
        # Either module, under one set of signatures.
        weights = self.operands["W_enc"]
        compiled = compilable and kernels.usable(weights)
        self.elementwise: Any = kernels if compiled else elementwise
        self.adam: Any = kernels if compiled else optim
        self.passes: Any = sparse_plain if sparse_kernels is None else sparse_kernels

    @property
    def stack(self) -> Stack:
        """Views of all SAEs."""
        return Stack(self.params, self.moments, self.operands, self.born, self.stamps)

    @property
    def paths(self) -> tuple[str, ...]:
        """Which step each SAE takes next, "dense" or "sparse"."""
        return tuple("sparse" if sparse else "dense" for sparse in self.sparse.tolist())

    def one(self, index: int) -> Params:
        """The SAE at one place of the stack, copied to the CPU."""
        return PARAMS[self.arch](**{name: tensor[index].cpu().clone() for name, tensor in self.params.items()})

    # -- what a checkpoint holds

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, as it is; the tensors are the bank's own."""
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
        """Let latents whose rows of `params` were written anew start afresh: no moments, their own bias correction."""
        for name, moment in self.moments.items():
            if name != "b_dec":
                moment[sae, latents] = 0
        self.born[sae, latents] = self.steps
        self._cast_weights()

    def _cast_weights(self, which: slice | int = slice(None)) -> None:
        """Bring the dense products' operands up to date."""
        self.screens.clear()
        for name, operand in self.operands.items():
            if operand is not self.params[name]:
                operand[which].copy_(self.params[name][which])

    # -- the step

    def step(self, x: Tensor, l1_coefficients: Tensor, adam: Adam) -> Figures:
        """One whole training step on x (rows, d_in), the scaled inputs less `centre`; l1_coefficients (saes,) float64.

        An SAE whose rate is 0, or whose loss on this batch is not finite, is left entirely untouched. On the CPU the
        figures of the first are NaN.
        """
        if self.centre.device.type != "cpu":
            figures, _ = self._dense(slice(None), x, l1_coefficients, adam)
        else:
            figures = Figures.none(self.saes, self.d_sae)
            running = adam.lr > 0
            for sae in (running & self.sparse).nonzero()[:, 0].tolist():
                self._sparse(sae, x, l1_coefficients, adam, figures)
            for some in _runs((running & ~self.sparse).tolist()):
                own, opened = self._dense(some, x, l1_coefficients, adam)
                figures.put(some, own)
                if self.fixed is None:
                    self.sparse[some] |= opened <= TAKEN_UP * CROSSOVER[self.arch] * len(x) * self.d_sae
            if self.sparse.all():
                self.scratch.kept.clear()  # the dense step's buffers are larger than the weights
        self.steps = adam.step
        return figures

    def _dense(self, some: slice, x: Tensor, l1_coefficients: Tensor, adam: Adam) -> tuple[Figures, Tensor]:
        """Take the dense step; also returns how many gates were open."""
        stack, l1 = self.stack[some], l1_coefficients[some]
        gradients, figures, opened = dense.gradients(stack, x, self.centre, l1, self.elementwise, self.scratch)
        rates = torch.where(torch.isfinite(figures.loss(l1)), adam.lr[some], 0)
        dense.update(stack, gradients, replace(adam, lr=rates), self.adam)
        return figures, opened

    def _sparse(self, sae: int, x: Tensor, l1_coefficients: Tensor, adam: Adam, figures: Figures) -> None:
        """Take the sparse step, or, where too many gates are open, let the SAE take the dense one."""
        one, own = self.stack[sae], replace(adam, lr=adam.lr[sae])
        if self.screened and sae not in self.screens:
            self.screens[sae] = screening.Screen.of(one.params["W_enc"])
        share = 1.0 if self.fixed else CROSSOVER[self.arch]
        limit = int(share * len(x) * self.d_sae)
        passes, l1 = (self.passes, self.screens.get(sae), self._sparse_scratch), float(l1_coefficients[sae])
        taken = sparse.step(one, x, self.centre, l1, own, limit, *passes)
        if taken is None:
            sparse.catch_up(one, adam.beta2, adam.step - 1)
            self._cast_weights(sae)
            self.sparse[sae] = False
        else:
            figures.put(sae, taken)


def _runs(chosen: list[bool]) -> Iterator[slice]:
    """Neighbours that were chosen, as slices."""
    first = None
    for at, here in enumerate([*chosen, False]):
        if here and first is None:
            first = at
        elif not here and first is not None:
            yield slice(first, at)
            first = None
