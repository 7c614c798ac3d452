"""The `gsae` command, run in the tests' own process."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import pytest

from gsae.cli import main


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def gsae(*arguments: Any) -> Done:
    """Run the command in this process: what the console script calls, with its own argv, stdout and stderr."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["gsae", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.argv = argv
    return Done(int(end.value.code or 0), out.getvalue(), err.getvalue())


def refused(code: int, said: str, *arguments: Any) -> None:
    """The command ends with `code` and one line on stderr that contains `said`; stdout stays empty."""
    done = gsae(*arguments)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("gsae: ")]
    assert len(lines) == 1, done.stderr
    assert said in lines[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
