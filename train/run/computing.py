"""What a run computes on: the device, the number of CPU threads, and the precision of a GPU's float32 products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gsae.errors import UsageError
from gsae.train.step.compiling import kernel_threads

from .config import Precision, RunConfig


def device_of(config: RunConfig) -> str:
    """The device that a new run computes on. Raises UsageError if it cannot multiply in the precision."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.precision == "tf32" and not device.startswith("cuda"):
        raise UsageError(
            f"Precision tf32 needs a GPU, and the device is {device!r}. Use --precision float32 or bfloat16."
        )
    return device


@contextmanager
def computing_with(count: int, precision: Precision = "float32") -> Iterator[None]:
    """Compute with `count` CPU threads, on which the last bits of sums depend, and with tf32 products if asked.

    The threads of compiled functions are set first, because their pool sets the number of torch's OpenMP threads when
    it starts.
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
