"""Float64 moments of the rows of a site, binned by norm: mean, scale and median of all rows or of all but the largest.

A few rows can hold half of a site's sum of squares (15 of 98,629 rows hold 48 % on one site of a 135M model). So sums
are kept for each bin of log2 ||x||^2, eight bins an octave, and the moments of the rows below any bin's edge are exact
without another pass. Bins follow from the bits of ||x||^2 and not from a logarithm, so they are equal on all machines.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gsae.errors import CorruptError
from gsae.store.codec.norm_kernels import binned_sums, float_bits, squared_norms
from gsae.store.codec.planes_kernels import F64, I64

from .json_files import Count, StoredValue

BINS_PER_OCTAVE = 8
ROWS_AT_ONCE = 256
# Lower edges of an octave's bins as mantissas in [0.5, 1): from roots and products, which IEEE 754 rounds one way.
ROOTS = [np.sqrt(2.0), np.sqrt(np.sqrt(2.0)), np.sqrt(np.sqrt(np.sqrt(2.0)))]
EDGES = np.array([0.5 * np.prod([r for i, r in enumerate(ROOTS) if k >> (2 - i) & 1]) for k in range(8)])
ZERO_BIN = -(1 << 14)


@dataclass(frozen=True)
class Summary:
    """Moments of the rows of a site whose norm is below `norm_limit`.

    mean: (d_in,). mean_square_norm: E||x||^2. variance: E||x - mean||^2. median_norm: over all finite rows.
    skipped: rows at or over the limit, or with a NaN or infinity.
    """

    rows: int
    skipped: int
    mean: F64
    mean_square_norm: float
    variance: float
    median_norm: float
    norm_limit: float
    squared_norm_limit: float


@dataclass(frozen=True)
class Moments:
    """Counts and sums of each bin that has a row.

    bins, counts: (bins,) ascending bin numbers, and the number of rows in each. sums, squares: (bins, d_in) sums of x
    and of x^2. non_finite: number of rows with a NaN or an infinity; they are in no bin.
    """

    bins: I64
    counts: I64
    sums: F64
    squares: F64
    non_finite: int

    @staticmethod
    def of(rows: NDArray[Any], dtype: str) -> "Moments":
        """Return the moments of rows (rows, d_in), bit patterns or values of a float `dtype`."""
        builder = MomentsBuilder(rows.shape[1], dtype)
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            builder.add(part, sort_by_norm(part, dtype))
        return builder.moments()

    @classmethod
    def merged(cls, parts: Sequence["Moments"], d_in: int) -> Self:
        """Return the moments of all parts together, added in the order given: the same order gives the same bits."""
        bins = np.unique(np.concatenate([np.zeros(0, np.int64), *(p.bins for p in parts)]))
        counts = np.zeros(len(bins), np.int64)
        sums, squares = np.zeros((len(bins), d_in)), np.zeros((len(bins), d_in))
        for part in parts:
            at = np.searchsorted(bins, part.bins)
            counts[at] += part.counts
            sums[at] += part.sums
            squares[at] += part.squares
        return cls(bins, counts, sums, squares, sum(p.non_finite for p in parts))

    @property
    def rows(self) -> int:
        """Rows with a finite norm."""
        return int(self.counts.sum())

    def within(self, max_norm_multiple: float) -> Summary:
        """Return the moments of the rows below `max_norm_multiple` times the median norm; 0 keeps all finite rows.

        The limit is raised to the next edge of a bin: rows with ||x|| < `norm_limit` are kept (infinity for 0).
        """
        median_bin = int(self.bins[np.searchsorted(np.cumsum(self.counts), (self.rows + 1) // 2)]) if self.rows else 0
        median = float(np.sqrt(bin_edge(median_bin + 0.5)))
        limit, keep = np.inf, np.ones(len(self.bins), bool)  # limit of ||x||^2
        if max_norm_multiple > 0:
            first_out = int(bin_of(np.array([(max_norm_multiple * median) ** 2]))[0]) + 1
            limit, keep = bin_edge(first_out), self.bins < first_out
        rows = int(self.counts[keep].sum())
        mean = self.sums[keep].sum(axis=0) / max(rows, 1)
        total = float(self.squares[keep].sum())
        mean_square = total / max(rows, 1)
        return Summary(
            rows=rows,
            skipped=self.rows - rows + self.non_finite,
            mean=mean,
            mean_square_norm=mean_square,
            variance=mean_square - float(mean @ mean),
            median_norm=median,
            norm_limit=float(np.sqrt(limit)),
            squared_norm_limit=limit,
        )

    def to_record(self) -> "MomentsRecord":
        """Return the moments as they stand in a record or manifest."""
        return MomentsRecord(
            bins=tuple(self.bins.tolist()),
            counts=tuple(self.counts.tolist()),
            sums=_text(self.sums),
            squares=_text(self.squares),
            non_finite=self.non_finite,
        )


@dataclass(frozen=True)
class RowsByNorm:
    """The rows of a part sorted by bin, in stored order inside a bin.

    Rows order[starts[i]] up to order[starts[i + 1]] are in bins[i].
    non_finite: rows with a NaN or an infinity, in no bin.
    """

    order: I64
    starts: I64
    bins: I64
    non_finite: int


def sort_by_norm(rows: NDArray[Any], dtype: str) -> RowsByNorm:
    """Sort rows (rows, d_in), bit patterns or values of a float `dtype`, by the bin of their norm."""
    norms = np.empty(len(rows), np.float64)
    squared_norms(float_bits(rows, dtype), norms)
    finite = np.flatnonzero(np.isfinite(norms))
    of_row = bin_of(norms[finite])
    order = np.argsort(of_row, kind="stable")
    bins, first = np.unique(of_row[order], return_index=True)
    return RowsByNorm(finite[order], np.append(first, len(finite)), bins, len(rows) - len(finite))


class MomentsBuilder:
    """Adds up moments. Parts are added in stored order; where rows are cut into parts does not change a bit.

    A bin gets its row of the sums when it first occurs.
    """

    def __init__(self, d_in: int, dtype: str) -> None:
        self._non_finite = 0
        self._dtype = dtype
        self._slot: dict[int, int] = {}
        self._counts = np.zeros(0, np.int64)
        self._sums, self._squares = np.zeros((0, d_in)), np.zeros((0, d_in))

    def add(self, rows: NDArray[Any], sorted_rows: RowsByNorm) -> None:
        """Add rows (rows, d_in); sorted_rows: what `sort_by_norm` returned for them."""
        slots = np.array([self._slot.setdefault(b, len(self._slot)) for b in sorted_rows.bins.tolist()], np.int64)
        if len(self._slot) > len(self._counts):
            self._grow(2 * len(self._slot))
        self._counts[slots] += np.diff(sorted_rows.starts)
        self._non_finite += sorted_rows.non_finite
        bits = float_bits(rows, self._dtype)
        binned_sums(bits, sorted_rows.order, sorted_rows.starts, slots, self._sums, self._squares)

    def moments(self) -> Moments:
        """Return the moments of all rows that were added."""
        bins = np.array(sorted(self._slot), np.int64)
        slots = np.array([self._slot[b] for b in bins.tolist()], np.int64)
        return Moments(bins, self._counts[slots], self._sums[slots], self._squares[slots], self._non_finite)

    def _grow(self, slots: int) -> None:
        more = slots - len(self._counts)
        self._counts = np.concatenate([self._counts, np.zeros(more, np.int64)])
        none = np.zeros((more, self._sums.shape[1]))
        self._sums, self._squares = np.concatenate([self._sums, none]), np.concatenate([self._squares, none])


class MomentsRecord(StoredValue):
    """Moments in JSON. Sums and squares are base64 of little-endian float64, which keeps every digit."""

    bins: tuple[Annotated[int, Field(ge=ZERO_BIN, lt=-ZERO_BIN)], ...]
    counts: tuple[Count, ...]
    sums: str
    squares: str
    non_finite: Count

    def read(self, d_in: int) -> Moments:
        """Return the moments of a site of width d_in. Raises CorruptError if sizes disagree."""
        shape = (len(self.bins), d_in)
        if len(self.counts) != len(self.bins) or list(self.bins) != sorted(set(self.bins)):
            raise CorruptError("the norm bins of a site's moments are not ascending, or lack counts.")
        return Moments(
            np.array(self.bins, np.int64),
            np.array(self.counts, np.int64),
            _floats(self.sums, shape),
            _floats(self.squares, shape),
            self.non_finite,
        )


def bin_of(squares: F64) -> I64:
    """Return the bin of each ||x||^2: floor(8 log2), exactly at the edges; ZERO_BIN for 0."""
    mantissa, exponent = np.frexp(squares)
    within = np.searchsorted(EDGES, mantissa, side="right") - 1
    bins = (exponent.astype(np.int64) - 1) * BINS_PER_OCTAVE + within
    return np.where(squares == 0, ZERO_BIN, bins)


def bin_edge(number: float) -> float:
    """Return the lower edge of bin `number` as ||x||^2, from the constants of `bin_of`; k + 0.5 is the middle of k."""
    whole = int(np.floor(number))
    if whole <= ZERO_BIN:
        return 0.0
    octave, within = divmod(whole, BINS_PER_OCTAVE)
    lower = float(np.ldexp(EDGES[within], octave + 1))
    return lower if number == whole else float(np.sqrt(lower * bin_edge(whole + 1)))


def _text(values: F64) -> str:
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def _floats(text: str, shape: tuple[int, int]) -> F64:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raise CorruptError("the sums of a site's moments are not base64.") from None
    if len(raw) != 8 * shape[0] * shape[1]:
        raise CorruptError(f"the sums of a site's moments have {len(raw)} bytes; {8 * shape[0] * shape[1]} are needed.")
    return np.frombuffer(raw, "<f8").reshape(shape).astype(np.float64)
