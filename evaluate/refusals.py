"""What the operating system refuses when a file or folder is written, as one clear error."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gsae.store import SpaceError, UsageError


@contextmanager
def refusals_told(out: Path) -> Iterator[None]:
    """Raise SpaceError where the disk is full, else UsageError, for an OSError while `out` is written."""
    try:
        yield
    except OSError as error:
        kind = SpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UsageError
        raise kind(f"{out} could not be written: {error.strerror}.") from error
