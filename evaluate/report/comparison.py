"""Gated SAEs against the baseline: the L0 ratio at equal score with its interval, or the reason why there is none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gsae.evaluate.eval_json import Evaluation, PerContext

from .bootstrap import Interval, bootstrap
from .pareto import SCORES, Point, Ratio, Score, l0_ratio


@dataclass(frozen=True)
class Comparison:
    """The ratio for one score and its interval; interval: None where eval.json has no sums by context."""

    ratio: Ratio
    interval: Interval | None


def compare(evaluations: Sequence[Evaluation], score: Score) -> Comparison:
    """Return ratio and interval of the `gated` SAEs against the `relu` ones; all must be of one site of one store."""
    sets = {(e.site, e.store_digest) for e in evaluations}
    if len(sets) > 1:
        names = ", ".join(sorted({site for site, _ in sets}))
        return Comparison(Ratio(None, f"SAEs of several sites or stores ({names}) are not comparable"), None)
    if evaluations and all(getattr(e, score) is None for e in evaluations):
        why = " (the language model was not available)" if score == "ce_loss_score" else ""
        return Comparison(Ratio(None, f"no SAE has it{why}"), None)
    scored = [e for e in evaluations if e.l0 is not None and getattr(e, score) is not None]
    gated, baseline = ([e for e in scored if e.architecture == kind] for kind in ("gated", "relu"))
    ratio = l0_ratio(_points(gated, score), _points(baseline, score))
    if ratio.value is None:
        return Comparison(ratio, None)
    return Comparison(ratio, bootstrap(_sums(gated), _sums(baseline), score))


def summary(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Return `l0_ratio` and `l0_ratio_ev` with their 90 % intervals [low, high], ready for JSON.

    evaluations: of one site of one store. A ratio that cannot be computed is None, and `reason` says why in one line;
    `reason` is None where there are both ratios.
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


def _points(scored: Sequence[Evaluation], score: Score) -> list[Point]:
    return [Point(float(e.l0 or 0), float(getattr(e, score))) for e in scored]


def _sums(scored: Sequence[Evaluation]) -> list[PerContext]:
    return [e.per_context or PerContext() for e in scored]


def _pair(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]
