"""A step as one CUDA graph: all its kernels are launched at once, with what a step differs in read from the device.

A step launches about a hundred kernels, which takes longer than some of them compute. A graph records the launches of
one call and repeats them on the same memory. So inputs are copied into the memory of the recorded call, and whatever
changes from step to step without being an input, such as an SAE that goes to another step, needs a new graph.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3  # calls before one is recorded: they compile kernels and make room for buffers


class StepGraph:
    """A function of tensors on a GPU that changes what it knows in place and waits for nothing."""

    def __init__(self, function: Callable[..., Tensor | None], cuda: Any = torch.cuda) -> None:
        """cuda: replaced in tests that have no GPU."""
        self._function, self._cuda = function, cuda
        self._kind: Hashable = None
        self._calls = 0
        self._graph: Any = None
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Tensor | None = None

    def __call__(self, kind: Hashable, *inputs: Tensor) -> Tensor | None:
        """Call the function; the result is valid until the next call. Calls of one kind launch the same kernels."""
        if kind != self._kind:
            self._kind, self._calls, self._graph = kind, 0, None
        self._calls += 1
        if self._calls <= WARM_UPS:
            return self._function(*inputs)
        if self._graph is None:
            self._record(inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._result

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(value.clone() for value in inputs)
        self._graph = self._cuda.CUDAGraph()
        # Other threads may allocate meanwhile: the reader pins memory for batches.
        with self._cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = self._function(*self._inputs)
