"""The files of metrics: the lines of each group, and `metrics.jsonl` of the run, which is made from them.

`metrics.jsonl` has the lines of all groups by step, then in the order of the SAEs. It is made after every checkpoint
and at the end, so its bytes do not depend on which process trained which group.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from gsae.errors import CorruptError
from gsae.files import held, replace_text
from gsae.settings import first_fault

from .config import ResolvedRun
from .metrics_line import MetricsLine

METRICS = "metrics.jsonl"


def group_folder(run: Path, number: int) -> Path:
    """The folder of a group."""
    return run / "state" / str(number)


def truncate_metrics(folder: Path, size: int) -> None:
    """Cut the metrics of a group to their size at its checkpoint. Raises CorruptError if the file is shorter."""
    path = folder / METRICS
    path.touch()
    if path.stat().st_size < size:
        raise CorruptError(f"{path} has {path.stat().st_size} bytes; the checkpoint needs {size}.")
    os.truncate(path, size)


def merge_metrics(run: Path, config: ResolvedRun) -> None:
    """Make `metrics.jsonl` from the lines of all groups."""
    place = {sae.name: index for index, sae in enumerate(config.saes)}
    with held(run / ".lock"):  # the last process to merge has seen what every other one wrote
        lines: list[tuple[int, int, str]] = []
        for number in range(len(config.groups())):
            for text in _group_lines(run, number):
                line = json.loads(text)
                lines.append((int(line["step"]), place[line["sae"]], text))
        merged = "".join(text for _, _, text in sorted(lines))
        path = run / METRICS
        if not path.exists() or path.read_text() != merged:
            replace_text(path, merged)


def last_lines(run: Path, config: ResolvedRun) -> dict[str, MetricsLine]:
    """The newest line of every SAE that has one, by name. Raises CorruptError if a line cannot be read."""
    found: dict[str, MetricsLine] = {}
    for number in range(len(config.groups())):
        for text in _group_lines(run, number):
            try:
                line = MetricsLine.parse(text)
            except ValidationError as error:
                path = group_folder(run, number) / METRICS
                raise CorruptError(f"{path} has a line that is not of metrics: {first_fault(error)}.") from None
            found[line.sae] = line
    return found


def _group_lines(run: Path, number: int) -> list[str]:
    """The lines of a group, without one that is still being written."""
    with suppress(FileNotFoundError):
        text = (group_folder(run, number) / METRICS).read_text()
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return []
