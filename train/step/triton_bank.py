"""A `FastBank` on a GPU with Triton: fused dense steps, exact sparse steps, and nothing that waits for the host.

How many gates are open is known on the device alone. If a list of open gates overflows, a flag on the device is set,
under which this step and all later ones change nothing. The host looks at the flag one step late (`train/run/replay`),
calls `give_up` and takes those steps again, the SAE concerned on the dense path. So the result is that of a host that
waited for every list.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gsae.train.architectures.base import Params

from . import adam_triton, dense_triton, sparse, sparse_triton
from .adam import Adam
from .batch_sums import BatchSums
from .buffers import Buffers
from .crossovers import fuses_encoder
from .fast_bank import TAKEN_UP, FastBank, neighbours
from .gates_triton import GateLists, Shadow, open_gates

LOOK_EVERY = 16  # steps after which SAEs on the dense path may change to the sparse one; the host waits there


class TritonBank(FastBank):
    """A stack of SAEs, as `FastBank`; overflown (saes,) bool: whose list of open gates overflowed."""

    def __init__(
        self, start: Sequence[Params], centre: Tensor, operands: torch.dtype, device: str | torch.device,
        *, sparse_share: float, tf32: bool = False,
    ) -> None:  # fmt: skip
        """As `FastBank`; sparse_share: of open gates, up to which an SAE takes the sparse step; 0 for never."""
        super().__init__(start, centre, operands, device, tf32=tf32)
        self.fixed = None
        self.sparse_share = sparse_share
        self.dense_passes, self.adam_steps = dense_triton, adam_triton
        self.overflown = torch.zeros(self.saes, dtype=torch.bool, device=self.centre.device)
        on_gpu = self.centre.is_cuda
        self.fused_encoder = on_gpu and fuses_encoder(torch.cuda.get_device_name(self.centre.device))
        self._shadow: Shadow | None = None  # follows the weights of SAEs on the sparse path
        self._by_slice: dict[tuple[int, int], Buffers] = {}  # of neighbours on the sparse path, until these change
        self._opened: list[tuple[slice, Tensor]] = []  # how many gates of SAEs on the dense path were open

    @property
    def went(self) -> Tensor | None:
        """Whether the last step took place, () bool on the device; None where every step does."""
        return ~self.overflown.any() if self.sparse_share else None

    def give_up(self, step: int, beta2: float) -> None:
        """Let SAEs whose list overflowed take the dense step from now on, and clear the flag. Waits for the device.

        step: the first that did not take place.
        """
        for sae in self.overflown.nonzero()[:, 0].tolist():
            sparse.catch_up(self.stack[sae], beta2, step - 1)
            self._cast_weights(sae)
            self.sparse[sae] = False
        self._by_slice.clear()
        self.overflown.zero_()

    def step(self, x: Tensor, l1_coefficients: Tensor, adam: Adam) -> BatchSums:
        """As `Bank.step`. Nothing is changed, and the sums mean nothing, if `went` is false afterwards."""
        lists = [(some, self._open_gates(some, x)) for some in neighbours(self.sparse.tolist())]
        if lists:
            self._note_overflows(lists)
            adam = replace(adam, lr=torch.where(self.overflown.any(), 0, adam.lr))
        batch = BatchSums.unknown(self.saes, self.d_sae, x.device)
        for some, own in lists:
            parts = replace(adam, lr=adam.lr[some]), own, self._shadow_of(some), self._buffers_of(some)
            batch.put(some, sparse_triton.step(self.stack[some], x, self.centre, l1_coefficients[some], *parts))
        self._opened = []
        for some in neighbours((~self.sparse).tolist()):
            taken, count = self._dense(some, x, l1_coefficients, adam)
            batch.put(some, taken)
            self._opened.append((some, count))
        if isinstance(adam.step, int):
            self.look(adam.step, len(x))
        return batch

    def look(self, step: int, rows: int) -> None:
        """As `Bank.look`: let SAEs with few open gates take the sparse step, at every step in `LOOK_EVERY`."""
        self.steps = step
        if not (self.sparse_share and self._opened and step % LOOK_EVERY == 0) or bool(self.overflown.any()):
            return
        for some, count in self._opened:
            few = (count <= TAKEN_UP * self.sparse_share * rows * self.d_sae).cpu()
            self.sparse[some] = few
            if few.any():
                self._follow(some)
                self._by_slice.clear()
        if self.sparse.all():
            self._buffers.free()  # those of the dense step are larger than the weights

    def _open_gates(self, some: slice, x: Tensor) -> GateLists:
        stack, limit = self.stack[some], max(1, int(self.sparse_share * len(x) * self.d_sae))
        offset = stack.params["b_dec"] - self.centre
        found = stack.vectors().gate, limit, self._buffers_of(some)
        return open_gates(stack, x, offset, self._shadow_of(some), *found, fused=self.fused_encoder)

    def _note_overflows(self, lists: list[tuple[slice, GateLists]]) -> None:
        """Set the flag of SAEs whose lists overflowed, unless an earlier step set it: this one has wrong weights."""
        found = torch.zeros_like(self.overflown)
        for some, own in lists:
            found[some] = own.overflown
        self.overflown |= found & ~self.overflown.any()

    def _cast_weights(self, which: slice | int = slice(None)) -> None:
        super()._cast_weights(which)
        self._follow(slice(which, which + 1) if isinstance(which, int) else which)

    def _follow(self, some: slice) -> None:
        if self._shadow is not None:
            self._shadow[some].follow(self.params["W_enc"][some])

    def _shadow_of(self, some: slice) -> Shadow:
        if self._shadow is None:
            self._shadow = Shadow.empty_like(self.params["W_enc"])
            self._follow(slice(None))
        return self._shadow[some]

    def _buffers_of(self, some: slice) -> Buffers:
        return self._by_slice.setdefault((some.start, some.stop), Buffers(self.centre.device))
