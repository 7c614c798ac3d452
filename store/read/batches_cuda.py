"""Batches on a GPU: the next one is copied on a separate CUDA stream while the consumer uses the current one.

It costs page-locked memory for the reader, and one more batch on the GPU.
"""

from collections import deque
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batches import Batches
from .read_order import Position
from .reading import Reading

Copy = tuple[Tensor, torch.cuda.Event, Position]


class CudaBatches(Batches):
    """`Batches` on a CUDA device. A batch is ready for the CUDA stream that is current when it is taken."""

    def __init__(self, reading: Reading, position: Position | None, device: torch.device) -> None:
        """Read as `Batches` does; device: a CUDA device."""
        super().__init__(replace(reading, pinned=True), position)
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._coming: Copy | None = None
        self._on_host: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __next__(self) -> Tensor:
        rows, copied, self._position = self._coming or self._copy()
        try:
            self._coming = self._copy()
        except StopIteration:
            self._coming = None
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(copied)
        rows.record_stream(consumer)  # its memory is reused after the consumer's kernels only
        return rows

    def _copy(self) -> Copy:
        """Start to copy the next batch; its slot is held until the copy is done."""
        host, position = self._take()
        while self._on_host and self._on_host[0][1].query():  # type: ignore[no-untyped-call]
            self._on_host.popleft()
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            rows = host.to(self._device, non_blocking=True)
            copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        self._on_host.append((host, copied))
        return rows, copied, position

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._reading, self._position, self._device)
