"""How sure an L0 ratio is: its interval over held-out contexts that are drawn again with replacement.

It covers the choice of contexts, but neither seeds nor sweeps. A thousand redraws of ten SAEs take about 0.1 s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gsae.evaluate.eval_json import PerContext

from .pareto import Floats, Score, ratio_of_curves

MIN_DEFINED = 0.9  # of the redraws must have a ratio, or the interval would describe a selection of them
BLOCK = 2**22  # (redraws, contexts) counts in memory at once

_SUMS: dict[Score, tuple[str, ...]] = {
    "ce_loss_score": ("rows", "l0", "clean", "spliced", "zero"),
    "explained_variance": ("rows", "l0", "sse", "sst"),
}


@dataclass(frozen=True)
class Interval:
    """5, 50 and 95 % points of the ratio over redrawn contexts, and the share of redraws that had a ratio."""

    low: float
    middle: float
    high: float
    defined: float


def bootstrap(
    gated: Sequence[PerContext],
    baseline: Sequence[PerContext],
    score: Score,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval | None:
    """Return the interval of `l0_ratio` over held-out contexts drawn with replacement, the same draw for every SAE.

    gated, baseline: each SAE's sums over the same contexts. L0 and score are computed again from the totals of each
    draw; explained variance keeps the mean row of the whole set. None where sums are missing, the SAEs were evaluated
    on different contexts, or too few draws have a ratio.
    """
    sums = _stack((*gated, *baseline), _SUMS[score])
    if sums is None or not len(gated):
        return None
    ratios: list[float] = []
    for counts in _draws(sums.shape[2], resamples, seed):
        l0, scores = _from_totals(np.einsum("skc,rc->krs", sums, counts, optimize=True), score)
        for some_l0, some_scores in zip(l0, scores, strict=True):
            g, b = slice(None, len(gated)), slice(len(gated), None)
            value = ratio_of_curves(some_l0[g], some_scores[g], some_l0[b], some_scores[b]).value
            if value is not None:
                ratios.append(value)
    if len(ratios) < MIN_DEFINED * resamples:
        return None
    low, middle, high = (float(q) for q in np.quantile(ratios, (0.05, 0.5, 0.95)))
    return Interval(low, middle, high, len(ratios) / resamples)


def _draws(contexts: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how often each context is drawn, in blocks (some resamples, contexts); no numpy version changes them."""
    bits = np.random.Philox(key=seed)
    block = max(1, BLOCK // contexts)
    for start in range(0, resamples, block):
        n = min(block, resamples - start)
        drawn = (bits.random_raw(n * contexts) % np.uint64(contexts)).astype(np.int64).reshape(n, contexts)
        drawn += np.arange(n)[:, None] * contexts
        yield np.bincount(drawn.ravel(), minlength=n * contexts).reshape(n, contexts).astype(np.float64)


def _stack(per_context: Sequence[PerContext], names: Sequence[str]) -> Floats | None:
    """Return an array (SAEs, names, contexts), or None where a sum is missing or lengths differ."""
    columns = [[getattr(sums, name) for name in names] for sums in per_context]
    lengths = {-1 if c is None else len(c) for sae in columns for c in sae}
    if len(lengths) != 1 or lengths <= {-1, 0}:
        return None
    return np.array(columns, dtype=np.float64)


def _from_totals(totals: Floats, score: Score) -> tuple[Floats, Floats]:
    """Return L0 and score, (resamples, SAEs) each; totals: (names of `_SUMS`, resamples, SAEs)."""
    rows, l0, *rest = totals
    with np.errstate(divide="ignore", invalid="ignore"):
        if score == "explained_variance":
            sse, sst = rest
            return l0 / rows, 1 - sse / sst
        clean, spliced, zero = rest
        return l0 / rows, 1 - (spliced - clean) / (zero - clean)
