"""Batches on a device that is no CPU and no CUDA GPU, such as Apple's: each is copied when it is taken.

Nothing overlaps: such devices have no pinned memory, and a copy that does not wait may read a batch that is being
overwritten.
"""

from typing import Any

import torch
from torch import Tensor

from gsae.errors import UsageError

from .batches import Batches
from .read_order import Position
from .reading import Reading


class CopiedBatches(Batches):
    """`Batches` on any device."""

    def __init__(self, reading: Reading, position: Position | None, device: torch.device) -> None:
        """Read as `Batches` does, and copy to `device`. Raises UsageError if that is not there."""
        super().__init__(reading, position)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UsageError(f"Device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
        self._device = device

    def __next__(self) -> Tensor:
        return super().__next__().to(self._device, copy=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._reading, self._position, self._device)
