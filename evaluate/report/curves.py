"""The training curves of a run's metrics.jsonl, thinned while they are read.

The metrics.jsonl of a long run may be larger than memory should hold, so a curve never has more than twice MAX_POINTS
points.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from gsae.errors import CorruptError
from gsae.settings import first_fault
from gsae.train import MetricsLine

METRICS = ("l0", "explained_variance", "gamma", "dead", "loss")
MAX_POINTS = 200


@dataclass(frozen=True)
class Curve:
    """One SAE's training curve: columns of equal length, `step` and those of `METRICS` that were logged."""

    step: tuple[int, ...]
    values: Mapping[str, tuple[float | None, ...]]


def read_curves(path: Path) -> dict[str, Curve]:
    """Read a metrics.jsonl; return each SAE's curve by name.

    A torn last line, of a run that is still writing, is left out. Raises CorruptError for any other line that is not
    one of metrics.
    """
    if not path.is_file():
        return {}
    found: dict[str, _Thinned] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, text in enumerate(lines, 1):
            try:
                line = MetricsLine.parse(text)
            except ValidationError as error:
                if not text.endswith("\n"):
                    break
                raise CorruptError(f"{path}, line {number}: {first_fault(error)}.") from error
            found.setdefault(line.sae, _Thinned()).add(line)
    return {name: thinned.curve() for name, thinned in found.items()}


def thin(curve: Curve, points: int) -> Curve:
    """Return at most `points` points of a curve, evenly spaced, with its first and last; none where `points` is 0."""
    n = len(curve.step)
    if n <= points:
        return curve
    at = [round(i * (n - 1) / (points - 1)) for i in range(points)] if points > 1 else []
    return Curve(
        step=tuple(curve.step[i] for i in at),
        values={name: tuple(column[i] for i in at) for name, column in curve.values.items()},
    )


class _Thinned:
    """The lines of a curve of unknown length: whenever 2 * MAX_POINTS are held, every other one is dropped."""

    def __init__(self) -> None:
        self._lines: list[MetricsLine] = []
        self._last: MetricsLine | None = None
        self._seen = 0
        self._stride = 1

    def add(self, line: MetricsLine) -> None:
        if self._seen % self._stride == 0:
            self._lines.append(line)
        if len(self._lines) == 2 * MAX_POINTS:
            self._lines = self._lines[::2]
            self._stride *= 2
        self._seen += 1
        self._last = line

    def curve(self) -> Curve:
        lines = self._lines if self._last is None or self._lines[-1] is self._last else [*self._lines, self._last]
        logged = [name for name in METRICS if any(name in line.model_fields_set for line in lines)]
        whole = Curve(
            step=tuple(line.step for line in lines),
            values={name: tuple(getattr(line, name) for line in lines) for name in logged},
        )
        return thin(whole, MAX_POINTS)
