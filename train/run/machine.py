"""What the last bits of a run depend on beside its settings: versions, and the processor that multiplies."""

from collections.abc import Mapping, Sequence

import numba
import torch

from gsae import __version__
from gsae.errors import UsageError

FIELDS = ("gsae", "torch", "numba", "processor")


def machine_for(device: str) -> dict[str, str]:
    """Versions, and the name of the GPU or the instruction set that torch uses on this CPU.

    Raises UsageError for a GPU that is not there.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise UsageError(f"The run computes on {device!r}, and torch finds no GPU here.")
    if device.startswith("mps") and not torch.backends.mps.is_available():
        raise UsageError(f"The run computes on {device!r}, and torch finds no GPU of Apple's here.")
    processor = torch.cuda.get_device_name(device) if on_gpu else f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    if device.startswith("mps"):
        processor = "GPU of Apple"
    values = __version__, str(torch.__version__), numba.__version__, processor
    return dict(zip(FIELDS, values, strict=True))


def changes(before: Sequence[Mapping[str, str]], now: Mapping[str, str]) -> str:
    """How this machine differs from the last one of a run, in words; nothing if it does not, or if none is known."""
    if not before:
        return ""
    pairs = ((name, before[-1].get(name, "unknown"), now[name]) for name in FIELDS)
    return ", ".join(f"{name} was {was}, is {here}" for name, was, here in pairs if was != here)
