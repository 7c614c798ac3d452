"""What a run computes on: the device, and the number of CPU threads."""

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch

from gsae.errors import UsageError
from gsae.train.step.compiling import kernel_threads
from gsae.train.step.crossovers import sparse_share_of
from gsae.train.step.screening import screening_pays

from .config import ResolvedRun, RunConfig
from .ranks import Ranks

OLDEST_TRITON = (3, 6)


def device_of(config: RunConfig) -> str:
    """The device that a new run computes on. Raises UsageError if it cannot multiply in the precision."""
    device = named_device(config.device)
    if config.precision == "tf32" and not device.startswith("cuda"):
        raise UsageError(
            f"Precision tf32 needs a GPU, and the device is {device!r}. Use --precision float32 or bfloat16."
        )
    return device


def named_device(name: str) -> str:
    """A device by its name in torch; "auto" is a GPU if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def triton_is_there() -> bool:
    """Whether Triton is installed, in a version that the kernels were tested with."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    found = re.match(r"(\d+)\.(\d+)", str(triton.__version__))
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST_TRITON


def kernels_of(config: RunConfig, device: str) -> Literal["triton", "plain"] | None:
    """The code of a new run's steps on a GPU; None on other devices. Raises UsageError for one that is not there."""
    on_gpu = device.startswith("cuda")
    there = (on_gpu or config.kernels == "triton") and triton_is_there()  # it is imported only where it may be used
    if config.kernels == "triton" and not (there and (on_gpu or os.environ.get("TRITON_INTERPRET") == "1")):
        raise UsageError(
            "--kernels triton needs a CUDA GPU and the package triton from 3.6 on, which torch for CUDA brings; "
            f"the device is {device!r}. Leave the option out."
        )
    kernels = config.kernels or (("triton" if there else "plain") if on_gpu else None)
    if config.cuda_graph and not (kernels == "triton" and on_gpu):
        raise UsageError("--cuda-graph needs a CUDA GPU and --kernels triton.")
    return kernels


def measured_share(device: str, precision: str) -> float:
    """The share of open gates up to which the sparse step was measured to pay on this device; 0 if it was not."""
    return sparse_share_of(torch.cuda.get_device_name(device), precision) if device.startswith("cuda") else 0.0


def resolved_here(config: RunConfig, ranks: Ranks) -> ResolvedRun:
    """The settings of a run that begins on this machine. Raises as `device_of` and `kernels_of`."""
    device = device_of(config)
    kernels = kernels_of(config, device)
    return config.resolved(
        device=device, threads=ranks.threads, ranks=ranks.world_size, screening=screening_pays(), kernels=kernels,
        sparse_share=measured_share(device, config.precision) if kernels == "triton" else None,
    )  # fmt: skip


@contextmanager
def computing_with(count: int, device: str = "cpu") -> Iterator[None]:
    """Compute with `count` CPU threads, on which the last bits of sums depend, and on this GPU, if it is one.

    Triton's kernels and CUDA graphs run on the current GPU, wherever their tensors are.

    The threads of compiled functions are set first, because their pool sets the number of torch's OpenMP threads when
    it starts.
    """
    before = torch.get_num_threads()
    try:
        gpu = torch.cuda.device(torch.device(device)) if ":" in device else nullcontext()
        with kernel_threads(count), gpu:
            torch.set_num_threads(count)
            yield
    finally:
        torch.set_num_threads(before)
