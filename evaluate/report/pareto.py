"""How many times fewer latents one architecture needs for the same score.

Only points on the Pareto front of their architecture count: those that no other one beats in both L0 and score. Log L0
is taken as piecewise linear in the score. The two curves are compared at equal steps of the scores that both reach, so
the ratio never rests on extrapolation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Score = Literal["ce_loss_score", "kl_div_score", "explained_variance"]

SCORES: tuple[Score, ...] = ("ce_loss_score", "kl_div_score", "explained_variance")
STEPS = 101
AT = {"low": 10, "middle": 50, "high": 90}  # steps, which are per cent of the scores that both curves reach
MIN_OVERLAP = 0.1  # of the range of scores that either curve covers


@dataclass(frozen=True)
class Point:
    """An SAE, or the mean of some: active latents in a row, and score (higher is better)."""

    l0: float
    score: float


@dataclass(frozen=True)
class Gap:
    """The two curves at one score: the one nearest the middle where the ratio is within 1 % of its median."""

    score: float
    gated_l0: float
    baseline_l0: float


@dataclass(frozen=True)
class At:
    """The ratio at one score; name: where in the range of common scores it lies."""

    name: str
    score: float
    ratio: float


@dataclass(frozen=True)
class Ratio:
    """Baseline L0 over Gated L0 at equal score, or None with the reason in one line.

    value: the median over the common scores. at: the ratio at a low, a middle and a high one, which shows whether it
    changes along the curves.
    """

    value: float | None
    reason: str = ""
    gap: Gap | None = None
    at: tuple[At, ...] = ()


def non_dominated(l0: Floats, score: Floats) -> NDArray[np.intp]:
    """Return the indices, by growing L0, of points that no other point beats with an L0 as low and a score as high.

    l0, score: (points,). Of equal points one is kept. Points without a finite score or a positive L0 are left out.
    """
    usable = np.flatnonzero(np.isfinite(l0) & np.isfinite(score) & (l0 > 0))
    ranked = usable[np.lexsort((-score[usable], l0[usable]))]
    ahead = np.maximum.accumulate(np.concatenate(([-np.inf], score[ranked])))[:-1]
    return ranked[score[ranked] > ahead]


def band(curves: Sequence[Sequence[Point]]) -> list[tuple[float, float, float]]:
    """Return the spread of curves as (L0, lowest score, highest score), over the L0 that all of them cover.

    curves: one for each seed. Only a curve's Pareto front counts, joined linearly in log L0. There is an entry at the
    L0 of each point of any curve. Empty where fewer than two curves have two points, or they share no L0.
    """
    kept = []
    for curve in curves:
        l0, score = _columns(curve)
        front = non_dominated(l0, score)
        if len(front) > 1:
            kept.append((np.log(l0[front]), score[front]))
    if len(kept) < 2:
        return []
    low, high = max(at[0] for at, _ in kept), min(at[-1] for at, _ in kept)
    if low >= high:
        return []
    steps = np.unique(np.concatenate([[low, high], *(at for at, _ in kept)]))
    steps = steps[(steps >= low) & (steps <= high)]
    scores = np.array([np.interp(steps, at, score) for at, score in kept])
    ends = np.exp(steps).tolist(), scores.min(0).tolist(), scores.max(0).tolist()
    return list(zip(*ends, strict=True))


def l0_ratio(gated: Sequence[Point], baseline: Sequence[Point]) -> Ratio:
    """Return the median over the common scores of baseline L0 / Gated L0; above 1, Gated needs fewer latents.

    None with a reason where a curve has fewer than 2 points, or where the scores that both curves reach span less than
    `MIN_OVERLAP` of the scores that either reaches. Independent of the order of the points.
    """
    return ratio_of_curves(*_columns(gated), *_columns(baseline))


def ratio_of_curves(gated_l0: Floats, gated_score: Floats, baseline_l0: Floats, baseline_score: Floats) -> Ratio:
    """Return `l0_ratio` of curves that are given as arrays (points,)."""
    curves = []
    for name, l0, score in (("Gated", gated_l0, gated_score), ("baseline", baseline_l0, baseline_score)):
        kept = non_dominated(l0, score)
        if len(kept) < 2:
            plural = "" if len(kept) == 1 else "s"
            return Ratio(None, f"the {name} curve has {len(kept)} usable point{plural}, a ratio needs 2")
        curves.append((score[kept], np.log(l0[kept])))
    (gs, gl), (bs, bl) = curves
    low, high = max(gs[0], bs[0]), min(gs[-1], bs[-1])
    union = max(gs[-1], bs[-1]) - min(gs[0], bs[0])
    if high - low < MIN_OVERLAP * union:
        share = max(0.0, (high - low) / union)
        return Ratio(None, f"the curves share {share:.0%} of the scores they cover, a ratio needs {MIN_OVERLAP:.0%}")
    scores = np.linspace(low, high, STEPS)
    gated, baseline = np.interp(scores, gs, gl), np.interp(scores, bs, bl)
    gap = baseline - gated
    median = float(np.median(gap))
    near = np.flatnonzero(np.abs(gap - median) <= np.maximum(0.01, np.abs(gap - median).min()))
    at = int(near[np.argmin(np.abs(near - STEPS // 2))])
    return Ratio(
        float(np.exp(median)),
        gap=Gap(float(scores[at]), float(np.exp(gated[at])), float(np.exp(baseline[at]))),
        at=tuple(At(name, float(scores[step]), float(np.exp(gap[step]))) for name, step in AT.items()),
    )


def _columns(points: Sequence[Point]) -> tuple[Floats, Floats]:
    return (
        np.array([p.l0 for p in points], dtype=np.float64),
        np.array([p.score for p in points], dtype=np.float64),
    )
