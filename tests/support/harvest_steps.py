"""The steps of a harvest, timed one by one, and settings under which other threads disturb the launching thread less.

A step is a function of the harvest that is wrapped while it is timed, so its time includes its waiting for Python's
lock. Steps on different threads run at the same time, so their sums are no shares of the whole.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from statistics import median
from typing import Any
from unittest.mock import patch

from gsae.harvest import windows
from gsae.harvest.row_mover import Mover
from gsae.store import EncodedWindow, all_cores
from gsae.store.write import window_writer
from gsae.store.write.shard_writer import EncodedShards

Seconds = dict[str, list[float]]

STEPS: dict[str, tuple[Any, str]] = {
    "stage inputs": (Mover, "stage"),
    "launch a pass": (windows, "capture"),  # on a CPU: run it
    "hand over rows": (Mover, "put"),  # waits while LEAD batches are on the way
    "move rows": (Mover, "_move"),  # waits for the copy and for a buffer
    "encode a window": (windows, "encode_window"),
    "publish a window": (EncodedWindow, "publish"),
    "of that its files": (EncodedShards, "publish"),  # and those of the tokens, before the first pass
}


@contextmanager
def timed_steps() -> Iterator[Seconds]:
    """Yield the seconds of every call of each step inside the `with`; a call is added when it ends."""
    seconds: Seconds = {step: [] for step in STEPS}
    with ExitStack() as patches:
        for step, (owner, name) in STEPS.items():
            patches.enter_context(patch.object(owner, name, _timed(getattr(owner, name), seconds[step].append)))
        yield seconds


def summary(seconds: Seconds) -> dict[str, dict[str, float]]:
    """Return for each step the number of calls, their median and longest in milliseconds, and the sum in seconds."""
    return {
        step: {
            "calls": len(calls),
            "median_ms": round(1000 * median(calls), 3),
            "longest_ms": round(1000 * max(calls), 3),
            "seconds": round(sum(calls), 3),
        }
        for step, calls in seconds.items()
        if calls
    }


@contextmanager
def switch_interval(seconds: float = 2e-4) -> Iterator[None]:
    """Let a thread that waits for Python's lock ask for it after `seconds`, where Python's default is 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def fewer_encoding_threads() -> Iterator[None]:
    """Encode windows on a quarter of the cores."""
    threads = max(1, all_cores() // 4)
    with patch.object(window_writer, "all_cores", lambda: threads):
        yield


VARIANTS: dict[str, Callable[[], Any]] = {
    "as it is": nullcontext,
    "switch interval": switch_interval,
    "fewer encoding threads": fewer_encoding_threads,
}


def _timed(work: Callable[..., Any], took: Callable[[float], None]) -> Callable[..., Any]:
    @wraps(work)
    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            took(time.perf_counter() - began)

    return timed
