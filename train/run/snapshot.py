"""A copy of a group's tensors on the host, at one step, in memory that is kept from checkpoint to checkpoint.

On CUDA the memory is page-locked and the copies are queued behind the step, so that taking a snapshot does not wait for
the GPU. What that costs: the size of the state on the host, which torch rounds up (`memory.page_locked`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """Host memory for the tensors of one group, by name."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._copied: list[Any] = []

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Begin to copy tensors, of the same names and shapes each time, from any device.

        Later changes of a tensor do not reach its copy if they are queued on the stream that is current now. The copies
        are those that the call before returned; they are complete after `wait`. Raises RuntimeError without memory.
        """
        for name, tensor in tensors.items():
            if name not in self._kept:
                self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]
        return dict(self._kept)

    def wait(self) -> None:
        """Wait until the copies are complete. Any thread may call it."""
        for copied in self._copied:
            copied.synchronize()
