"""What a training run changes of its process while it lasts: how it hears signals, and how many threads compute."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .bank import kernel_threads


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT, in the main thread, instead of dying of them; the old handlers come back after."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, lambda number, _: caught.append(number)) for kind in kinds]
    try:
        yield caught
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


@contextmanager
def computing_with(count: int) -> Iterator[None]:
    """Compute with so many threads: sums may depend on it, so the run records it.

    The compiled functions come first: their thread pool, when it starts, sets the count of torch's OpenMP too.
    """
    before = torch.get_num_threads()
    try:
        with kernel_threads(count):
            torch.set_num_threads(count)
            yield
    finally:
        torch.set_num_threads(before)
