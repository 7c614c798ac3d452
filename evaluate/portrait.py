"""What one latent does, from all its firings: how often and how strongly, where most, and examples of every strength.

Everything is exact: no reservoir, no bins but those that are shown. Equal values are told apart by context and
position, and draws by a hash of the row, so nothing depends on the order in which rows were read.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .firings import Floats, Ints


@dataclass(frozen=True)
class Kept:
    """How much is kept of a latent.

    top: contexts with its largest values. quantiles of its values, `samples` rows of each. bins: of its histogram.
    neighbours: latents of like decoder rows. logits: tokens that it promotes most, and as many that it suppresses.
    """

    top: int = 20
    quantiles: int = 5
    samples: int = 5
    bins: int = 50
    neighbours: int = 8
    logits: int = 10


@dataclass(frozen=True)
class Example:
    """A row on which a latent fires, and every row of its context on which it does.

    quantile: of the latent's values, 0 the weakest; None for one of the contexts at the top. source: context *
    context_size + position. positions, values: (n,).
    """

    quantile: int | None
    rank: int
    source: int
    value: float
    positions: Ints
    values: Floats


@dataclass(frozen=True)
class Portrait:
    """A latent that fires. histogram: (bins,). quantile_edges: (quantiles + 1,). top_source: of its largest value."""

    rows: int
    max: float
    mean: float
    histogram: Ints
    quantile_edges: Floats
    top_source: int
    examples: tuple[Example, ...]


def portrait(latent: int, sources: Ints, values: Floats, context_size: int, kept: Kept) -> Portrait:
    """Describe a latent from its firings (n,), n at least 1, by source."""
    contexts = sources // context_size
    starts = np.flatnonzero(np.concatenate([[True], contexts[1:] != contexts[:-1]]))
    ends = np.append(starts[1:], len(sources))
    rising = _rising(values)
    cuts = [len(values) * q // kept.quantiles for q in range(kept.quantiles + 1)]

    def example(quantile: int | None, rank: int, row: int) -> Example:
        context = int(np.searchsorted(starts, row, side="right")) - 1
        whole = slice(int(starts[context]), int(ends[context]))
        return Example(
            quantile, rank, int(sources[row]), float(values[row]), sources[whole] % context_size, values[whole]
        )

    top = _top_rows(values, starts, kept.top)
    examples = [example(None, rank, row) for rank, row in enumerate(top.tolist())]
    for quantile, (begin, end) in enumerate(pairwise(cuts)):
        drawn = _drawn(latent, sources, rising[begin:end], kept.samples)
        strongest = drawn[np.lexsort((sources[drawn], -values[drawn]))]
        examples += [example(quantile, rank, row) for rank, row in enumerate(strongest.tolist())]
    return Portrait(
        rows=len(values),
        max=float(values.max()),
        mean=float(values.mean(dtype=np.float64)),
        histogram=_histogram(values, kept.bins),
        quantile_edges=values[rising[[*cuts[:-1], -1]]],
        top_source=int(sources[top[0]]) if len(top) else int(sources[np.argmax(values)]),
        examples=tuple(examples),
    )


def _top_rows(values: Floats, starts: Ints, top: int) -> Ints:
    """Return the first of the largest rows of each of the `top` contexts with the largest, the largest first."""
    largest = np.maximum.reduceat(values, starts)
    chosen = np.argsort(-largest, kind="stable")[:top]
    ends = np.append(starts[1:], len(values))[chosen]
    return np.array(
        [begin + np.argmax(values[begin:end]) for begin, end in zip(starts[chosen], ends, strict=True)], np.int64
    )


def _histogram(values: Floats, bins: int) -> Ints:
    """Count values (n,) in bins of equal width from 0 to the largest; the upper edge of a bin belongs to it."""
    share = values.astype(np.float64) * bins / np.float64(values.max())
    return np.bincount(np.clip(np.ceil(share).astype(np.int64) - 1, 0, bins - 1), minlength=bins)


def _rising(values: Floats) -> Ints:
    """Return the order of values (n,) above 0, equal ones as they stand: a stable argsort at half the time."""
    bits = values.view(np.uint32).astype(np.uint64)  # they ascend as the values do
    key = np.sort(bits << np.uint64(32) | np.arange(len(values), dtype=np.uint64))
    return (key & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _drawn(latent: int, sources: Ints, rows: Ints, samples: int) -> Ints:
    """Return at most `samples` of `rows`, by a hash of latent and source."""
    if len(rows) <= samples:
        return rows
    return rows[np.argpartition(_hash(sources[rows], latent), samples)[:samples]]


def _hash(sources: Ints, latent: int) -> NDArray[np.uint64]:
    """Mix 64 bits as SplitMix64 does (Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        z = sources.astype(np.uint64) + np.uint64(latent + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
