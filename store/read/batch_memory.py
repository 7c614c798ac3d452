"""The memory that batches are decoded into: slots of one batch each, handed out without a copy and used again.

Fresh memory costs more than decoding into it (the kernel clears each page), so all slots are taken once. A slot is
free again when nothing refers any more to the rows handed out from it. A consumer that keeps many batches gets
copies beyond `kept`, so it can neither starve the reader nor make the slots grow.
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

KEPT = 2  # batches that one consumer holds: the one at hand, and the one before until it is let go


class SlotsClosed(Exception):  # noqa: N818  (it ends the thread that waits for a slot; nobody else sees it)
    """No slot will be free any more."""


class Slots:
    """`slots` times (batch_rows, width) values, all in one array `rows`, free ones in a queue."""

    def __init__(self, slots: int, batch_rows: int, width: int, dtype: str, kept: int, pinned: bool) -> None:
        """Take the memory; raises SpaceError.

        dtype: the store's. kept: how many batches may be lent at a time. pinned: so that a GPU copies from it alone.
        """
        bits = unsigned(dtype)
        size = slots * batch_rows * width * np.dtype(bits).itemsize
        try:
            memory: Any = _pinned(size) if pinned else pages(size)
        except (OSError, OverflowError, RuntimeError):
            raise SpaceError(
                f"No memory for {slots} batches, {size} bytes. Use smaller batches or a smaller mix."
            ) from None
        self._memory = memoryview(memory)
        self._kept = kept
        self._shape, self._dtype = (batch_rows, width), dtype
        self.rows: NDArray[Any] = np.frombuffer(self._memory, bits).reshape(-1, width)
        self._prepared: dict[int, tuple[NDArray[Any], Tensor]] = {}
        self._free: SimpleQueue[int | None] = SimpleQueue()
        self._returned: deque[int] = deque()  # its append may be called anywhere, by the garbage collector too
        self._lent: list[weakref.ref[NDArray[Any]]] = []
        for slot in range(slots):
            self._free.put(slot)

    def take(self) -> int:
        """Return a free slot, waiting for one; raises SlotsClosed."""
        slot = self._free.get()
        if slot is None:
            raise SlotsClosed
        return slot

    def give_back(self, slot: int) -> None:
        """Return a slot that was taken and not lent."""
        self._prepared.pop(slot, None)
        self._returned.append(slot)

    def release(self) -> None:
        """Make free what came back. The reader wants many slots at once, so it is woken for them once, not for each."""
        for _ in range(len(self._returned)):
            self._free.put(self._returned.popleft())

    def prepare(self, slot: int) -> None:
        """Make the tensor of a slot that is taken, so that its consumer, whose caches are cold, need not."""
        self._prepared[slot] = self._rows_of(slot, self._shape[0])

    def lend(self, slot: int, rows: int) -> Tensor:
        """Return the first rows of a slot, (rows, width); it comes back when they and all views of them are gone."""
        prepared = self._prepared.pop(slot, None)
        memory, lent = prepared if prepared and rows == self._shape[0] else self._rows_of(slot, rows)
        self._lent = [held for held in self._lent if held() is not None]
        if len(self._lent) >= self._kept:
            copy = lent.clone()
            self.give_back(slot)
            return copy
        returned = self._returned
        self._lent.append(weakref.ref(memory, lambda _: returned.append(slot)))
        return lent

    def _rows_of(self, slot: int, rows: int) -> tuple[NDArray[Any], Tensor]:
        """Return the first rows of a slot as a tensor, and the array that lives as long as any view of them."""
        batch_rows, width = self._shape
        offset = slot * batch_rows * width * self.rows.itemsize
        # An array of its own over the memory, not a slice: numpy lets every view of it keep exactly this one alive.
        memory = np.frombuffer(self._memory, self.rows.dtype, rows * width, offset)
        return memory, as_tensor(memory.reshape(rows, width), self._dtype)

    def close(self) -> None:
        """Wake who waits for a slot. What was lent stays valid as long as it is held."""
        self._free.put(None)


def slots_needed(group_rows: int, batch_rows: int, kept: int) -> int:
    """Return the slots for two groups of `group_rows` rows, the consumer's `kept` batches and one being filled."""
    return max(2 * group_rows // batch_rows, -(-group_rows // batch_rows)) + kept + 1


def _pinned(size: int) -> NDArray[np.uint8]:
    memory: NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def as_tensor(rows: NDArray[Any], dtype: str) -> Tensor:
    """Return rows of bit patterns as a tensor of `dtype`, without a copy."""
    signed = {2: np.int16, 4: np.int32, 8: np.int64}[rows.dtype.itemsize]
    kind: torch.dtype = getattr(torch, dtype)
    return torch.from_numpy(rows.view(signed)).view(kind)
