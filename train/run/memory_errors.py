"""Running out of memory while SAEs are trained, as one line: how much was asked for, where, and what to change.

The check before a run (`fitting.py`) counts what a group holds. Other processes, allocators and kernels need more.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from gsae.errors import SpaceError

from .config import ResolvedRun, ResolvedSAE
from .fitting import ADVICE, KEPT, change, named

TEXTS = ("not enough memory", "out of memory", "can't allocate memory")  # of a RuntimeError of torch's allocators
ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


@contextmanager
def memory_errors(run: ResolvedRun, groups: Sequence[Sequence[ResolvedSAE]]) -> Iterator[None]:
    """Turn an error of the device's or the host's memory, while some groups are trained, into a SpaceError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        where = _where(error, run.device)
        if where is None:
            raise
        asked = ASKED.search(str(error))
        much = f" at a request for {asked[1]} more" if asked else ""
        raise SpaceError(f"Out of memory on {where}{much}, while training {_advised(groups)} {KEPT}") from error


def _advised(groups: Sequence[Sequence[ResolvedSAE]]) -> str:
    """What is trained, and what to change."""
    if len(groups) == 1:
        return f"{named(groups[0])}. {change(len(groups[0]))}"
    return f"{sum(map(len, groups))} SAEs in {len(groups)} groups. Train with fewer SAEs in a run, {ADVICE}."


def _where(error: MemoryError | RuntimeError, device: str) -> str | None:
    """Which memory an error is about; None if it is about something else."""
    if isinstance(error, torch.OutOfMemoryError):
        return device
    if isinstance(error, MemoryError):
        return "the host"
    text = str(error)
    if not any(known in text for known in TEXTS):
        return None
    return "the host" if "DefaultCPUAllocator" in text or device == "cpu" else device
