"""A latent described from all its firings: how often and how strongly it fires, where most, examples of all strengths.

Everything is exact: there is no reservoir sampling, and no bins but those of the histogram. Ties are broken by context
and position, and samples are drawn by a hash of the row, so the result does not depend on the order of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .firings import Floats, Ints
from .settings import FeatureSettings


@dataclass(frozen=True)
class Examples:
    """n rows on which a latent fires, and with each all rows of its context on which the latent fires.

    quantile: of the latent's values, 0 the weakest; -1 for the top contexts. rank: within the quantile, 0 the
    strongest. source: context * context_size + position. These and `value` and `lengths` are (n,). positions, values:
    (m,) those of each example's context, one example after another; lengths: how many each example has.
    """

    quantile: NDArray[np.int8]
    rank: NDArray[np.int16]
    source: Ints
    value: Floats
    lengths: Ints
    positions: Ints
    values: Floats


@dataclass(frozen=True)
class Portrait:
    """A latent that fires.

    histogram: (bins,). quantile_edges: (quantiles + 1,). top_source: the source of its largest value.
    """

    rows: int
    max: float
    mean: float
    histogram: Ints
    quantile_edges: Floats
    top_source: int
    examples: Examples


def portrait(latent: int, sources: Ints, values: Floats, context_size: int, settings: FeatureSettings) -> Portrait:
    """Describe a latent from its firings (n,) in the order of their sources; n is at least 1."""
    contexts = sources // context_size
    starts = np.flatnonzero(np.concatenate([[True], contexts[1:] != contexts[:-1]]))
    rising, drawn = _rising(values), _hash(sources, latent)
    cuts = [len(values) * q // settings.quantiles for q in range(settings.quantiles + 1)]
    top = _top_rows(values, starts, settings.top)
    samples = [_sampled(rising[begin:end], values, drawn, settings.samples) for begin, end in pairwise(cuts)]
    return Portrait(
        rows=len(values),
        max=float(values.max()),
        mean=float(values.mean(dtype=np.float64)),
        histogram=_histogram(values, settings.bins),
        quantile_edges=values[rising[[*cuts[:-1], -1]]],
        top_source=int(sources[top[0]]) if len(top) else int(sources[np.argmax(values)]),
        examples=_examples([top, *samples], sources, values, starts, context_size),
    )


def _examples(groups: Sequence[Ints], sources: Ints, values: Floats, starts: Ints, context_size: int) -> Examples:
    """Return the examples of groups of rows: the top group, then each quantile's. starts: first row of each context."""
    sizes, rows = [len(group) for group in groups], np.concatenate(groups)
    context = np.searchsorted(starts, rows, side="right") - 1
    lengths = np.append(starts[1:], len(sources))[context] - starts[context]
    whole = np.repeat(starts[context] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    return Examples(
        quantile=np.repeat(np.arange(-1, len(groups) - 1, dtype=np.int8), sizes),
        rank=np.concatenate([np.arange(size, dtype=np.int16) for size in sizes]),
        source=sources[rows],
        value=values[rows],
        lengths=lengths,
        positions=sources[whole] % context_size,
        values=values[whole],
    )


def _top_rows(values: Floats, starts: Ints, top: int) -> Ints:
    """Return the row of the largest value (the first of equal ones) in each of the `top` contexts, largest first."""
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
    """Return the stable argsort of values (n,) above 0, in half the time of numpy's."""
    bits = values.view(np.uint32).astype(np.uint64)  # of positive floats, in the order of the values
    key = np.sort(bits << np.uint64(32) | np.arange(len(values), dtype=np.uint64))
    return (key & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _sampled(rows: Ints, values: Floats, drawn: NDArray[np.uint64], samples: int) -> Ints:
    """Return the `samples` of `rows` with the smallest `drawn` (all, where there are fewer), the strongest first."""
    if len(rows) > samples:
        rows = rows[np.argpartition(drawn[rows], samples)[:samples]]
    return rows[np.lexsort((rows, -values[rows]))]


def _hash(sources: Ints, latent: int) -> NDArray[np.uint64]:
    """Mix latent and source to 64 bits as SplitMix64 does (Steele, Lea & Flood 2014)."""
    z = sources.astype(np.uint64) + np.uint64((latent + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
