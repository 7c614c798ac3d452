"""A reader's ratings, a JSON line each. The last rating of a trial counts.

A rating is on the disk before the server answers it, which costs an fsync each.
"""

import json
import threading
from pathlib import Path

from gsae.errors import CorruptError
from gsae.files import append

ANSWERS = ("no", "maybe", "yes")  # what ratings 0, 1 and 2 mean


class Ratings:
    """The ratings of trials 0 to `trials` - 1, in one file."""

    def __init__(self, path: Path, trials: int) -> None:
        """Read the file. Raises CorruptError for a line that is no rating.

        A last line without a line end was never answered and is ignored.
        """
        self._path, self._trials, self._lock = path, trials, threading.Lock()
        content = path.read_bytes() if path.exists() else b""
        self._end = content.rfind(b"\n") + 1
        self._found: dict[int, int] = {}
        for number, line in enumerate(content[: self._end].splitlines(), 1):
            try:
                trial, rating = (json.loads(line)[key] for key in ("trial", "rating"))
                self._check(trial, rating)
            except (ValueError, KeyError, TypeError):
                raise CorruptError(f"{path}, line {number}: no rating of one of {trials} trials.") from None
            self._found[trial] = rating

    def current(self) -> dict[int, int]:
        """Return the rating of each trial that has one."""
        with self._lock:
            return dict(self._found)

    def record(self, trial: int, rating: int) -> None:
        """Append one rating and sync it.

        Raises ValueError where there is no such trial or rating, and OSError where it cannot be written.
        """
        self._check(trial, rating)
        line = json.dumps({"trial": trial, "rating": rating}).encode() + b"\n"
        with self._lock:
            append(self._path, line, self._end)
            self._end += len(line)
            self._found[trial] = rating

    def _check(self, trial: int, rating: int) -> None:
        whole = type(trial) is int and type(rating) is int
        if not whole or not 0 <= trial < self._trials or not 0 <= rating < len(ANSWERS):
            raise ValueError(f"no rating {rating!r} of trial {trial!r}")
