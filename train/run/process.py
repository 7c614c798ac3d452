"""What a training run takes of its process: its device, how it hears signals, how it computes while it lasts."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gsae.errors import UsageError
from gsae.train.step.bank import kernel_threads

from .config import Precision, RunConfig


def device_of(config: RunConfig) -> str:
    """The device that a new run computes on; UsageError where that cannot multiply in the precision asked for."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.precision == "tf32" and not device.startswith("cuda"):
        raise UsageError(f"Precision tf32 is a GPU's alone, and the device is {device!r}: take float32 or bfloat16.")
    return device


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
def computing_with(count: int, precision: Precision = "float32") -> Iterator[None]:
    """Compute with so many threads, on which sums may depend, and a GPU's float32 products in tf32 or in full.

    The compiled functions come first: their thread pool, when it starts, sets the count of torch's OpenMP too.
    """
    before, products = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    try:
        with kernel_threads(count):
            torch.set_num_threads(count)
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cuda.matmul.allow_tf32 = products
