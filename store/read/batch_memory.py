"""The memory that batches are decoded into: slots of one batch each, lent without a copy and used again.

Fresh memory costs more than decoding into it (the kernel clears each page), so all slots are allocated once. A slot is
free again when nothing refers to the rows that were lent from it. A consumer that holds more than `kept` batches gets
copies, so that it cannot stop the reader, and memory does not grow.
"""

import weakref
from collections import deque
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsae.errors import SpaceError
from gsae.store.codec.chunks import unsigned
from gsae.store.codec.scatter import pages

KEPT = 2  # batches that a consumer holds: the current one, and the one before until its variable is assigned again


class SlotsClosed(Exception):  # noqa: N818  (it ends the thread that waits for a slot, and is not an error)
    """No slot will become free: reading stops."""


class Slots:
    """Memory for `slots` batches (batch_rows, width), all in one array `rows`; free slots are in a queue."""

    def __init__(self, slots: int, batch_rows: int, width: int, dtype: str, kept: int, pinned: bool) -> None:
        """Allocate the memory. Raises SpaceError.

        dtype: the store's. kept: how many batches may be lent at a time. pinned: page-locked, for copies to a GPU.
        """
        bits = unsigned(dtype)
        size = slots * batch_rows * width * np.dtype(bits).itemsize
        try:
            memory: Any = _pinned(size) if pinned else pages(size)
        except (OSError, OverflowError, RuntimeError):
            raise SpaceError(
                f"No memory for {slots} batches ({size} bytes). Use smaller batches or a smaller mix."
            ) from None
        self._memory = memoryview(memory)
        self._kept = kept
        self._shape, self._dtype = (batch_rows, width), dtype
        self.rows: NDArray[Any] = np.frombuffer(self._memory, bits).reshape(-1, width)
        self._prepared: dict[int, tuple[NDArray[Any], Tensor]] = {}
        self._free: SimpleQueue[int | None] = SimpleQueue()
        self._returned: deque[int] = deque()  # a deque, since the garbage collector may append at any moment
        self._lent: list[weakref.ref[NDArray[Any]]] = []
        for slot in range(slots):
            self._free.put(slot)

    def take(self) -> int:
        """Wait for a free slot and return it. Raises SlotsClosed."""
        slot = self._free.get()
        if slot is None:
            raise SlotsClosed
        return slot

    def give_back(self, slot: int) -> None:
        """Take back a slot that was taken and not lent."""
        self._prepared.pop(slot, None)
        self._returned.append(slot)

    def release(self) -> None:
        """Free the slots that came back, all at once: the reader needs many, so it is woken once and not for each."""
        for _ in range(len(self._returned)):
            self._free.put(self._returned.popleft())

    def prepare(self, slot: int) -> None:
        """Make the tensor of a slot on the reading thread, so that the consumer has less to do."""
        self._prepared[slot] = self._view(slot, self._shape[0])

    def lend(self, slot: int, rows: int) -> Tensor:
        """Return the first rows of a slot, (rows, width). The slot comes back when all views of them are deleted."""
        prepared = self._prepared.pop(slot, None)
        memory, lent = prepared if prepared and rows == self._shape[0] else self._view(slot, rows)
        self._lent = [held for held in self._lent if held() is not None]
        if len(self._lent) >= self._kept:
            copy = lent.clone()
            self.give_back(slot)
            return copy
        returned = self._returned
        self._lent.append(weakref.ref(memory, lambda _: returned.append(slot)))
        return lent

    def _view(self, slot: int, rows: int) -> tuple[NDArray[Any], Tensor]:
        """Return the array that every view of the first rows of a slot keeps alive, and these rows as a tensor."""
        batch_rows, width = self._shape
        offset = slot * batch_rows * width * self.rows.itemsize
        # A new array over the memory and not a slice of `rows`: each view of it then keeps exactly this array alive.
        memory = np.frombuffer(self._memory, self.rows.dtype, rows * width, offset)
        return memory, as_tensor(memory.reshape(rows, width), self._dtype)

    def close(self) -> None:
        """Wake the thread that waits for a slot. Rows that were lent stay valid."""
        self._free.put(None)


def slots_needed(mix_rows: int, batch_rows: int, kept: int) -> int:
    """Return the slots for two mixes of `mix_rows` rows, the consumer's `kept` batches and one being filled."""
    return max(2 * mix_rows // batch_rows, -(-mix_rows // batch_rows)) + kept + 1


def _pinned(size: int) -> NDArray[np.uint8]:
    memory: NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def as_tensor(rows: NDArray[Any], dtype: str) -> Tensor:
    """Return rows of bit patterns as a tensor of `dtype`, without a copy."""
    signed = {2: np.int16, 4: np.int32, 8: np.int64}[rows.dtype.itemsize]
    kind: torch.dtype = getattr(torch, dtype)
    return torch.from_numpy(rows.view(signed)).view(kind)
