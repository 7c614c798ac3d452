"""What a run computes on: the device, and the number of CPU threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gsae.errors import UsageError
from gsae.train.step.compiling import kernel_threads

from .config import RunConfig


def device_of(config: RunConfig) -> str:
    """The device that a new run computes on. Raises UsageError if it cannot multiply in the precision."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if config.precision == "tf32" and not device.startswith("cuda"):
        raise UsageError(
            f"Precision tf32 needs a GPU, and the device is {device!r}. Use --precision float32 or bfloat16."
        )
    return device


@contextmanager
def computing_with(count: int) -> Iterator[None]:
    """Compute with `count` CPU threads, on which the last bits of sums depend.

    The threads of compiled functions are set first, because their pool sets the number of torch's OpenMP threads when
    it starts.
    """
    before = torch.get_num_threads()
    try:
        with kernel_threads(count):
            torch.set_num_threads(count)
            yield
    finally:
        torch.set_num_threads(before)
