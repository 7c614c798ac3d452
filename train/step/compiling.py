"""What all functions compiled by numba share: compiler options, threads, sums of one order, and bfloat16.

numba has no bfloat16, so arrays of it are read as 16-bit words (`array`) and converted one number at a time (`load`,
`store`).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# `load`, `store` and `total` are typed by numba.

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor


def compiled(function: Callable[..., None]) -> Any:
    """Compile a function for all threads of the CPU.

    Without fast math: numba optimises code once more when it caches it, so a sum in an order of the compiler's choice
    would differ between the process that compiled it and the next. Also NaN must be noticed.
    """
    return numba.njit(parallel=True, cache=True, error_model="numpy")(function)


@contextmanager
def kernel_threads(count: int) -> Iterator[None]:
    """Let compiled functions use `count` threads, or as many as there are."""
    before = numba.get_num_threads()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        numba.set_num_threads(before)


def array(tensor: Tensor) -> Any:
    """A view of a CPU tensor as a numpy array; of bfloat16, its 16-bit words."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def load(value):
    """In compiled code: a number of an array as a float."""
    raise NotImplementedError


def store(value, like):
    """In compiled code: a float as a number of the array that `like` is from."""
    raise NotImplementedError


@overload(load)
def _load(value):
    if value == numba.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@overload(store)
def _store(value, like):
    if like == numba.uint16:  # to the nearest, ties to even

        def rounded(value, like):
            bits = np.float32(value).view(np.uint32)
            up = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            # Rounding up must not turn a NaN into an infinity or a zero.
            return np.uint16(0x7FC0) if value != value else np.uint16(up >> np.uint32(16))

        return rounded
    return lambda value, like: value


def _add_up(values):
    """The sum of a float array, which is overwritten: halves onto halves, so the order is fixed and vectors fit."""
    left = len(values)
    while left > 1:
        half = left // 2
        front, back = values[:half], values[left - half : left]
        for i in range(half):
            front[i] += back[i]
        left -= half
    return values[0]


total = numba.njit(cache=True, error_model="numpy")(_add_up)
