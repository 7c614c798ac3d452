"""Gated SAEs against the baseline: the L0 ratio at equal score with its interval, or the reason why there is none.

The ratio is that of the curves of seed means; each seed's own ratio stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gsae.evaluate.eval_json import Evaluation

from .bootstrap import Interval, bootstrap
from .pareto import SCORES, Ratio, Score, ratio_of_curves
from .seed_means import Curve, Seed, seeds_of, values_of

KEYS: dict[Score, str] = {
    "ce_loss_score": "l0_ratio",
    "kl_div_score": "l0_ratio_kl",
    "explained_variance": "l0_ratio_ev",
}


@dataclass(frozen=True)
class Comparison:
    """The ratio for one score and its interval; interval: None where eval.json has no sums by document.

    by_seed: the ratio of each seed's own curves, None where it has none.
    """

    ratio: Ratio
    interval: Interval | None = None
    by_seed: tuple[tuple[Seed, float | None], ...] = ()


def compare(evaluations: Sequence[Evaluation], score: Score) -> Comparison:
    """Return ratio and interval of the `gated` SAEs against the `relu` ones; all must be of one site of one store."""
    sets = {(e.site, e.store_digest) for e in evaluations}
    if len(sets) > 1:
        names = ", ".join(sorted({site for site, _ in sets}))
        return Comparison(Ratio(None, f"SAEs of several sites or stores ({names}) are not comparable"))
    if evaluations and all(getattr(e, score) is None for e in evaluations):
        why = "" if score == "explained_variance" else " (the language model was not available)"
        return Comparison(Ratio(None, f"no SAE has it{why}"))
    scored = [e for e in evaluations if e.l0 is not None and getattr(e, score) is not None]
    gated, baseline = (Curve.of(e for e in scored if e.architecture == kind) for kind in ("gated", "relu"))
    ratio = _ratio(gated, baseline, score)
    by_seed = tuple((seed, _ratio_of_seed(gated, baseline, score, seed)) for seed in seeds_of((gated, baseline)))
    return Comparison(ratio, None if ratio.value is None else bootstrap(gated, baseline, score), by_seed)


def summary(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the ratios for all scores, ready for JSON.

    For each of `l0_ratio` (at equal loss recovered), `l0_ratio_kl` and `l0_ratio_ev`: the ratio, `_interval` its 90 %
    interval [low, high], `_at` the ratio at a low, middle and high score of the common range. `seeds` has each seed's
    own ratios, `seeds_redrawn` says whether intervals are over seeds too, `documents` is the number of held-out
    documents. evaluations: of one site of one store. A ratio that cannot be computed is None, and `reason` says why in
    one line; `reason` is None where there are all ratios.
    """
    found = {score: compare(evaluations, score) for score in SCORES}
    reasons = [f"{score}: {c.ratio.reason}" for score, c in found.items() if c.ratio.reason]
    ratios: dict[str, Any] = {}
    for score, c in found.items():
        ratios[KEYS[score]] = c.ratio.value
        ratios[f"{KEYS[score]}_interval"] = c.interval and [c.interval.low, c.interval.high]
        ratios[f"{KEYS[score]}_at"] = {at.name: {"score": at.score, "ratio": at.ratio} for at in c.ratio.at} or None
    return {
        **ratios,
        "seeds": _by_seed(found),
        "seeds_redrawn": any(c.interval.seeds for c in found.values() if c.interval),
        "documents": documents(evaluations),
        "reason": "; ".join(reasons) or None,
    }


def documents(evaluations: Sequence[Evaluation]) -> int | None:
    """Return the number of held-out documents, the least where SAEs differ; None where no eval.json has it."""
    return min((e.heldout_documents for e in evaluations if e.heldout_documents is not None), default=None)


def _by_seed(found: dict[Score, Comparison]) -> list[dict[str, Any]]:
    """Return a record for each seed with its ratio for every score."""
    own = {score: dict(c.by_seed) for score, c in found.items()}
    seeds = dict.fromkeys(seed for ratios in own.values() for seed in ratios)
    return [{"seed": seed, **{KEYS[score]: own[score].get(seed) for score in SCORES}} for seed in seeds]


def _ratio(gated: Curve, baseline: Curve, score: Score) -> Ratio:
    """Return the ratio of the curves of seed means."""
    columns = (c.means(values_of(c.saes, key)) for c in (gated, baseline) for key in ("l0", score))
    return ratio_of_curves(*columns)


def _ratio_of_seed(gated: Curve, baseline: Curve, score: Score, seed: Seed) -> float | None:
    own = [Curve.of(e for e in curve.saes if e.seed == seed) for curve in (gated, baseline)]
    return _ratio(own[0], own[1], score).value
