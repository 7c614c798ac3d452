"""The report of some runs: one HTML file under 1 MB that needs no network.

Where many SAEs would make it larger, their training curves get fewer points.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from gsae.errors import UsageError
from gsae.files import disk_errors, replace_text

from .curves import MAX_POINTS
from .html import fill_html
from .page_data import make_page
from .runs import read_run

MAX_BYTES = 1_000_000


def report(runs: Sequence[Path], out: Path) -> None:
    """Write the report of the run folders to `out`, replacing it in one step.

    The same folders give the same bytes. Raises NotFoundError for a folder that is no run or was never evaluated,
    CorruptError for a file that cannot be read as what it should be, and UsageError where `out` is a folder or the page
    would be larger than 1 MB.
    """
    if not runs:
        raise UsageError("A report needs at least one run folder.")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; --out takes the report's file name, such as {out / 'report.html'}.")
    read = [read_run(folder) for folder in runs]
    command = shlex.join(["gsae", "report", *map(_shown_path, runs), "--out", _shown_path(out)])
    for points in (MAX_POINTS, 100, 50, 20, 0):
        html = fill_html(make_page(read, command, points))
        if len(html.encode()) < MAX_BYTES:
            with disk_errors(out):
                out.parent.mkdir(parents=True, exist_ok=True)
            replace_text(out, html, shared=True)
            return
    saes = sum(len(run.evaluations) for run in read)
    raise UsageError(f"A report of {saes} SAEs would be larger than 1 MB. Give fewer runs.")


def _shown_path(path: Path) -> str:
    return path.name if path.is_absolute() or ".." in path.parts else str(path)
