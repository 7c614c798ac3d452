"""The curve of seed means: SAEs that differ only in their seed are one point, with their mean L0 and mean score.

A ratio of two such curves rests on all seeds. A curve through the SAEs themselves would be led by the luckiest seed at
each sparsity.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gsae.evaluate.eval_json import Evaluation

from .pareto import Floats

Seed = int | None


@dataclass(frozen=True)
class Curve:
    """The SAEs of one architecture. points: for each point the indices of its SAEs, which differ only in their seed."""

    saes: tuple[Evaluation, ...]
    points: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, evaluations: Iterable[Evaluation]) -> "Curve":
        """Make points of SAEs of equal d_sae, l1_coefficient and lr, in any order.

        SAEs of one setting and one seed, such as those of two runs, stay apart: the first of each seed make a point,
        the second ones another.
        """
        saes = tuple(sorted(evaluations, key=_rank))
        seen: dict[tuple[object, ...], int] = {}
        points: dict[tuple[object, ...], list[int]] = {}
        for index, e in enumerate(saes):
            setting = (e.d_sae, e.l1_coefficient, e.lr)
            again = seen[*setting, e.seed] = seen.get((*setting, e.seed), -1) + 1
            points.setdefault((*setting, again), []).append(index)
        return cls(saes, tuple(map(tuple, points.values())))

    @property
    def fewest_seeds(self) -> int:
        """How many seeds the point with the fewest has; 0 without points."""
        return min(map(len, self.points), default=0)

    def means(self, values: Floats, drawn: Mapping[Seed, Floats] | None = None) -> Floats:
        """Return the mean of each point, (..., points), of the values of SAEs, (..., saes).

        drawn: how often each seed counts, (...); None for once. A point without any seed is NaN.
        """
        means = np.empty((*values.shape[:-1], len(self.points)))
        for number, members in enumerate(self.points):
            own = values[..., members]
            if drawn is None:
                means[..., number] = own.mean(-1)
            else:
                weights = np.stack([drawn[self.saes[index].seed] for index in members], axis=-1)
                with np.errstate(divide="ignore", invalid="ignore"):
                    means[..., number] = (weights * own).sum(-1) / weights.sum(-1)
        return means


def seeds_of(curves: Iterable[Curve]) -> list[Seed]:
    """Return the seeds of all curves, ascending; None stands for SAEs without one."""
    return sorted({e.seed for curve in curves for e in curve.saes}, key=lambda seed: -1 if seed is None else seed)


def values_of(saes: Sequence[Evaluation], key: str) -> Floats:
    """Return a metric of each SAE, (saes,), NaN where it has none."""
    found = (getattr(e, key) for e in saes)
    return np.array([np.nan if value is None else value for value in found], dtype=np.float64)


def _rank(e: Evaluation) -> tuple[float | str, ...]:
    numbers = (e.d_sae, e.l1_coefficient, e.lr, e.seed, e.steps, e.l0)
    return (*(-1.0 if value is None else float(value) for value in numbers), e.sae)
