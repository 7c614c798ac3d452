"""Steps whose outcome the host has not seen yet, so that it never waits for the step that the device works on.

A step may find on the device that it cannot take place (`train/step/triton_bank`). It sets a flag then, under which it
and all later steps change nothing. The host reads the flag of each step after it has launched the next one, and takes
the steps that did not take place again, on the same batches.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LAG = 1  # steps that may be on the device while the host goes on


@dataclass(frozen=True)
class Batch:
    """A step's number and what it is taken on: x (rows, d_in), scaled and centred, and its sum of squares."""

    step: int
    x: Tensor
    spread: Tensor


class Unseen:
    """The steps that the host has not seen the outcome of. Results do not depend on when it looks."""

    def __init__(self, take: Callable[[Batch], Tensor | None], give_up: Callable[[int], None]) -> None:
        """take: launch a step and return whether it takes place, () bool on the device, or None if it surely does.

        give_up: clear the flag and change what prevented the step of this number.
        """
        self._take, self._give_up = take, give_up
        self._waiting: deque[tuple[Batch, _Answer]] = deque()

    def add(self, batch: Batch) -> None:
        """Take a step, and look at the outcome of the one before."""
        self._launch(batch)
        self._see(LAG)

    def settle(self) -> None:
        """Wait until all steps have taken place."""
        self._see(0)

    def _launch(self, batch: Batch) -> None:
        went = self._take(batch)
        if went is not None:
            self._waiting.append((batch, _Answer(went)))

    def _see(self, leave: int) -> None:
        again: deque[Batch] = deque()
        while len(self._waiting) > leave or (again and self._waiting):
            batch, went = self._waiting.popleft()
            if not went.read():
                self._give_up(batch.step)
                again.extendleft(reversed([batch, *(later for later, _ in self._waiting)]))
                self._waiting.clear()
            if again:
                self._launch(again.popleft())


class _Answer:
    """A () bool on its way to the host."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._arrived: Any = None
        if value.is_cuda:
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(value.device))

    def read(self) -> bool:
        """The value; waits for the steps before it, not for later ones."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)
