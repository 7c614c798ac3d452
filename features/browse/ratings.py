"""A reader's ratings in a file of JSON lines, the last of a trial's counting: on the disk before they are answered."""

import json
import os
import threading
from pathlib import Path

from gsae.errors import CorruptError

WORDS = ("no", "maybe", "yes")  # what ratings 0, 1 and 2 mean


class Ratings:
    """The ratings of trials 0 to `trials` - 1, in one file."""

    def __init__(self, path: Path, trials: int) -> None:
        """Read what the file has; raises CorruptError for a line that is no rating.

        A last line without its end was never answered, and is left out.
        """
        self._path, self._trials, self._lock = path, trials, threading.Lock()
        content = path.read_bytes() if path.exists() else b""
        self._end = content.rfind(b"\n") + 1
        self._found: dict[int, int] = {}
        for number, line in enumerate(content[: self._end].splitlines(), 1):
            try:
                self._take(*(json.loads(line)[key] for key in ("trial", "rating")))
            except (ValueError, KeyError, TypeError):
                raise CorruptError(f"{path}, line {number}: no rating of one of {trials} trials.") from None

    def current(self) -> dict[int, int]:
        """Return the rating of each trial that has one."""
        with self._lock:
            return dict(self._found)

    def record(self, trial: int, rating: int) -> None:
        """Append one rating and sync it; raises ValueError where there is no such trial or rating."""
        with self._lock:
            before = dict(self._found)
            self._take(trial, rating)
            try:
                self._append(json.dumps({"trial": trial, "rating": rating}).encode() + b"\n")
            except OSError:
                self._found = before
                raise

    def _take(self, trial: int, rating: int) -> None:
        whole = type(trial) is int and type(rating) is int
        if not whole or not 0 <= trial < self._trials or not 0 <= rating < len(WORDS):
            raise ValueError(f"no rating {rating!r} of trial {trial!r}")
        self._found[trial] = rating

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(line)
