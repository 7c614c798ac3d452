"""What the ratings of a blind comparison say: counts, means, and the mean difference over pairs with its interval."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blind_key import read_key
from .ratings import ANSWERS, Ratings

RATINGS = "ratings.jsonl"
REDRAWS, CONFIDENCE = 10_000, 0.95


def ratings_of(folder: Path) -> Ratings:
    """Open the ratings of a comparison's folder."""
    return Ratings(folder / RATINGS, len(read_key(folder).trials))


def compare_ratings(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Return what the ratings so far say, ready for JSON.

    counts: no, maybe and yes of each SAE. difference: over the pairs with both halves rated, the mean of the first
    SAE's rating minus the second's, on the scale 0, 1, 2. interval: its 95 % interval by redrawing pairs, None with
    fewer than two pairs. seed: of the redraws.
    """
    key, ratings = read_key(folder), ratings_of(folder).current()
    halves: dict[int, dict[int, int]] = {}
    counts = [dict.fromkeys(ANSWERS, 0) for _ in key.saes]
    for number, rating in ratings.items():
        trial = key.trials[number]
        counts[trial.sae][ANSWERS[rating]] += 1
        halves.setdefault(trial.pair, {})[trial.sae] = rating
    both = np.array([half[0] - half[1] for _, half in sorted(halves.items()) if len(half) == 2], np.float64)
    return {
        "saes": list(key.saes),
        "architectures": list(key.architectures),
        "rated": len(ratings),
        "trials": len(key.trials),
        "counts": dict(zip(key.saes, counts, strict=True)),
        "means": dict(zip(key.saes, map(_mean, counts), strict=True)),
        "pairs": len(both),
        "difference": float(both.mean()) if len(both) else None,
        "interval": _interval(both, seed),
        "confidence": CONFIDENCE,
    }


def _mean(counts: dict[str, int]) -> float | None:
    rated = sum(counts.values())
    return sum(score * counts[answer] for score, answer in enumerate(ANSWERS)) / rated if rated else None


def _interval(differences: NDArray[np.float64], seed: int) -> list[float] | None:
    """Return the percentiles of the mean of pairs drawn again with replacement."""
    n = len(differences)
    if n < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, n, (REDRAWS, n))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    return [float(edge) for edge in np.quantile(differences[draws].mean(axis=1), tails)]
