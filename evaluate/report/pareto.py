"""How many times fewer latents one architecture needs for the same score, and how sure that figure is.

Only SAEs that no other of their architecture beats count. Log L0 is taken as piecewise linear in the score,
and the two curves are compared at equal steps of the scores that both reach, so the ratio never rests on
extrapolation. The interval redraws held-out contexts, not seeds or sweeps; a thousand redraws of ten SAEs
cost about 0.1 s.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Score = Literal["ce_loss_score", "explained_variance"]

SCORES: tuple[Score, ...] = ("ce_loss_score", "explained_variance")
STEPS = 101
MIN_OVERLAP = 0.1  # of the range of scores that either curve covers
MIN_DEFINED = 0.9  # of the redraws must have a ratio, or the interval would describe a selection of them
BLOCK = 2**22  # (redraws, contexts) counts in memory at once

_SUMS: dict[Score, tuple[str, ...]] = {
    "ce_loss_score": ("rows", "l0", "clean", "spliced", "zero"),
    "explained_variance": ("rows", "l0", "sse", "sst"),
}


@dataclass(frozen=True)
class Point:
    """One SAE: active latents a row, and the score to be had for them (higher is better)."""

    l0: float
    score: float


@dataclass(frozen=True)
class Gap:
    """The two curves at one score: where the ratio is within 1 % of its median, as near the middle as can be."""

    score: float
    gated_l0: float
    baseline_l0: float


@dataclass(frozen=True)
class Ratio:
    """Baseline L0 over Gated L0 at equal score, or None and the reason in one line."""

    value: float | None
    reason: str = ""
    gap: Gap | None = None


@dataclass(frozen=True)
class Interval:
    """5, 50 and 95 % points of the ratio over redrawn contexts, and the share of redraws that had a ratio."""

    low: float
    middle: float
    high: float
    defined: float


@dataclass(frozen=True)
class Comparison:
    """The ratio for one score with its interval; no interval where eval.json has no sums by context."""

    ratio: Ratio
    interval: Interval | None


def non_dominated(l0: Floats, score: Floats) -> NDArray[np.intp]:
    """Indices, by growing L0, of points for which no other has an L0 as low and a score as high.

    l0, score: (points,). Of equal points one is kept. Points without a finite score or a positive L0 never
    count.
    """
    usable = np.flatnonzero(np.isfinite(l0) & np.isfinite(score) & (l0 > 0))
    ranked = usable[np.lexsort((-score[usable], l0[usable]))]
    ahead = np.maximum.accumulate(np.concatenate(([-np.inf], score[ranked])))[:-1]
    return ranked[score[ranked] > ahead]


def band(curves: Sequence[Sequence[Point]]) -> list[tuple[float, float, float]]:
    """The spread of curves over the L0 that all of them cover: (L0, lowest, highest score) at the points of any.

    curves: one a seed. Of each only points that no other of it beats count, joined linearly in log L0. Empty where
    there are fewer than two curves of two points, or they cover no common L0.
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
    """Median over the common scores of baseline L0 / Gated L0; above 1, Gated needs fewer latents.

    None with a reason where a curve has fewer than 2 points, or where the scores that both curves reach span
    less than `MIN_OVERLAP` of those that either does. Independent of the order of the points.
    """
    return _ratio(*_columns(gated), *_columns(baseline))


def bootstrap(
    gated: Sequence[Mapping[str, Sequence[float | None] | None]],
    baseline: Sequence[Mapping[str, Sequence[float | None] | None]],
    score: Score,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval | None:
    """Interval of `l0_ratio` over held-out contexts drawn again with replacement, the same draw for every
    SAE.

    gated, baseline: each SAE's `per_context` of eval.json, sums (contexts,) over the same contexts. L0 and
    score are computed anew from each draw's totals; explained variance keeps the mean row of the whole set.
    None where sums are missing, SAEs were evaluated on different contexts, or too few draws have a ratio.
    """
    sums = _stack((*gated, *baseline), _SUMS[score])
    if sums is None or not len(gated):
        return None
    ratios: list[float] = []
    for counts in _draws(sums.shape[2], resamples, seed):
        l0, scores = _from_totals(np.einsum("skc,rc->krs", sums, counts, optimize=True), score)
        for some_l0, some_scores in zip(l0, scores, strict=True):
            g, b = slice(None, len(gated)), slice(len(gated), None)
            value = _ratio(some_l0[g], some_scores[g], some_l0[b], some_scores[b]).value
            if value is not None:
                ratios.append(value)
    if len(ratios) < MIN_DEFINED * resamples:
        return None
    low, middle, high = (float(q) for q in np.quantile(ratios, (0.05, 0.5, 0.95)))
    return Interval(low, middle, high, len(ratios) / resamples)


def compare(evaluations: Sequence[Mapping[str, Any]], score: Score) -> Comparison:
    """Ratio and interval of the `gated` SAEs against the `relu` ones among eval.json contents of one site."""
    sets = {(str(e["site"]), str(e["store_digest"])) for e in evaluations}
    if len(sets) > 1:
        names = ", ".join(sorted({site for site, _ in sets}))
        return Comparison(Ratio(None, f"SAEs of several sites or stores ({names}) are not comparable"), None)
    gated = [e for e in evaluations if e["architecture"] == "gated"]
    baseline = [e for e in evaluations if e["architecture"] == "relu"]
    if evaluations and all(e.get(score) is None for e in evaluations):
        why = " (the language model was not at hand)" if score == "ce_loss_score" else ""
        return Comparison(Ratio(None, f"no SAE has it{why}"), None)
    ratio = l0_ratio(_points(gated, score), _points(baseline, score))
    if ratio.value is None:
        return Comparison(ratio, None)
    return Comparison(ratio, bootstrap(_sums(gated, score), _sums(baseline, score), score))


def summary(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`l0_ratio` and `l0_ratio_ev` with their 90 % intervals [low, high], ready for JSON.

    evaluations: the contents of eval.json files of one site. A figure that cannot be given is None, and
    `reason` says why in one line; `reason` is None where both ratios are there.
    """
    found = {score: compare(evaluations, score) for score in SCORES}
    reasons = [f"{score}: {c.ratio.reason}" for score, c in found.items() if c.ratio.reason]
    ce, ev = (found[score] for score in SCORES)
    return {
        "l0_ratio": ce.ratio.value,
        "l0_ratio_interval": _pair(ce.interval),
        "l0_ratio_ev": ev.ratio.value,
        "l0_ratio_ev_interval": _pair(ev.interval),
        "reason": "; ".join(reasons) or None,
    }


def _ratio(gated_l0: Floats, gated_score: Floats, baseline_l0: Floats, baseline_score: Floats) -> Ratio:
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
    )


def _columns(points: Sequence[Point]) -> tuple[Floats, Floats]:
    return (
        np.array([p.l0 for p in points], dtype=np.float64),
        np.array([p.score for p in points], dtype=np.float64),
    )


def _draws(contexts: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each context is drawn: blocks of (some resamples, contexts), the same under any numpy
    version."""
    bits = np.random.Philox(key=seed)
    block = max(1, BLOCK // contexts)
    for start in range(0, resamples, block):
        n = min(block, resamples - start)
        drawn = (bits.random_raw(n * contexts) % np.uint64(contexts)).astype(np.int64).reshape(n, contexts)
        drawn += np.arange(n)[:, None] * contexts
        yield np.bincount(drawn.ravel(), minlength=n * contexts).reshape(n, contexts).astype(np.float64)


def _stack(per_context: Sequence[Mapping[str, Sequence[float | None] | None]], names: Sequence[str]) -> Floats | None:
    """(SAEs, names, contexts), or None where a sum is missing or lengths differ."""
    columns = [[p.get(name) for name in names] for p in per_context]
    lengths = {-1 if c is None else len(c) for sae in columns for c in sae}
    if len(lengths) != 1 or lengths <= {-1, 0}:
        return None
    return np.array(columns, dtype=np.float64)


def _from_totals(totals: Floats, score: Score) -> tuple[Floats, Floats]:
    """totals: (names of `_SUMS`, resamples, SAEs). Returns L0 and score, (resamples, SAEs) each."""
    rows, l0, *rest = totals
    with np.errstate(divide="ignore", invalid="ignore"):
        if score == "explained_variance":
            sse, sst = rest
            return l0 / rows, 1 - sse / sst
        clean, spliced, zero = rest
        return l0 / rows, 1 - (spliced - clean) / (zero - clean)


def _points(evaluations: Sequence[Mapping[str, Any]], score: Score) -> list[Point]:
    figures = [(e["l0"], e[score]) for e in evaluations]
    return [Point(l0, value) for l0, value in figures if l0 is not None and value is not None]


def _sums(evaluations: Sequence[Mapping[str, Any]], score: Score) -> list[Mapping[str, Sequence[float | None] | None]]:
    scored = [e for e in evaluations if e["l0"] is not None and e[score] is not None]
    return [e.get("per_context") or {} for e in scored]


def _pair(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]
