"""How long work is shown on stderr: a bar with rate and remaining time, or a line every few seconds in a log.

The loops know nothing of it: they report events to a listener, and `cli.py` turns those into calls of `show`.
"""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 5.0


class Shown:
    """Progress of one command, one stage at a time. Use it in a `with`."""

    def __init__(self, stream: TextIO | None = None, every: float = SECONDS_BETWEEN_LINES) -> None:
        """Show on `stream`, stderr if None: a bar when it is a terminal, else a line every `every` seconds."""
        stream = stream or sys.stderr
        console = Console(file=stream)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=console) if console.is_terminal else None
        self._stream, self._every = stream, every
        self._stage: str | None = None
        self._task: TaskID | None = None
        self._began = self._told = 0.0
        self._first = 0

    def show(self, stage: str, done: int = 0, total: int | None = None, detail: str = "") -> None:
        """Say that `done` of `total` of a stage is done; a new stage's name begins a new bar or line."""
        new = stage != self._stage
        if new:
            self._stage, self._began, self._first = stage, time.monotonic(), done
        if self._bars is not None:
            if new:
                self._task = self._bars.add_task(stage, total=total, detail=detail)
            self._bars.update(self._task or TaskID(0), completed=done, total=total, detail=detail)
        elif new or time.monotonic() - self._told >= self._every or (total is not None and done == total):
            self._told = time.monotonic()
            rate = (done - self._first) / max(self._told - self._began, 1e-9)
            print(_line(stage, done, total, detail, rate), file=self._stream, flush=True)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()


def _line(stage: str, done: int, total: int | None, detail: str, rate: float) -> str:
    """One line of a log; rate: units a second, 0 while unknown."""
    parts = []
    if total:
        parts.append(f"{done:,} of {total:,} ({100 * done / total:.0f} %)")
        if rate and done < total:
            parts.append(f"{(total - done) / rate:.0f} s left")
    parts += [detail] if detail else []
    return f"{stage}: {', '.join(parts)}" if parts else stage
