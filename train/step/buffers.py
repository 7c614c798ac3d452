"""Memory that is kept from step to step, because fresh memory costs a page fault for every 4 KiB."""

import torch
from torch import Tensor


class Buffers:
    """Uninitialised tensors by name, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until the same name is requested again."""
        size = int(torch.Size(shape).numel())
        flat = self._kept.get((name, dtype))
        if flat is None or len(flat) < size:
            grown = size + size // 4 if flat is not None else size
            self._kept[name, dtype] = flat = torch.empty(grown, dtype=dtype, device=self.device)
        return flat[:size].view(shape)

    def free(self) -> None:
        """Release all memory."""
        self._kept.clear()
