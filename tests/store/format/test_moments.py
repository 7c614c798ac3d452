"""Moments: equal to float64 brute force for all rows and every norm limit; the same bits for any cut of the rows."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.errors import CorruptError
from gsae.store import Moments
from gsae.store.codec.chunks import NUMPY_DTYPES
from gsae.store.codec.norm_kernels import binned_sums, binned_sums_plain, float_bits, squared_norms, squared_norms_plain
from gsae.store.format.json_files import canonical_json
from gsae.store.format.moments import MomentsBuilder, bin_edge, bin_of, sort_by_norm
from gsae.tests.support.stores import normal_rows


def with_outliers() -> np.ndarray:
    x = normal_rows(5000, 24)
    x[[7, 100, 4999]] = (x[[7, 100, 4999]].astype(np.float32) * 300).astype(ml_dtypes.bfloat16)
    x[50] = 0
    return x


@pytest.mark.parametrize("multiple", [0.0, 1.5, 10.0, 1000.0])
def test_moments_within_a_norm_equal_brute_force(multiple: float) -> None:
    x = with_outliers()
    summary = Moments.of(x, "bfloat16").within(multiple)
    wide = x.astype(np.float64)
    norms = np.sqrt((wide * wide).sum(axis=1))
    kept = wide[norms < summary.norm_limit]
    assert summary.rows == len(kept)
    assert summary.skipped == len(wide) - len(kept)
    np.testing.assert_allclose(summary.mean, kept.mean(axis=0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(summary.mean_square_norm, (kept**2).sum(axis=1).mean(), rtol=1e-12)
    np.testing.assert_allclose(summary.variance, ((kept - kept.mean(axis=0)) ** 2).sum(axis=1).mean(), rtol=1e-9)
    np.testing.assert_allclose(summary.median_norm, np.median(norms), rtol=0.05)
    if multiple:
        assert multiple * summary.median_norm <= summary.norm_limit <= 1.05 * multiple * summary.median_norm
    else:
        assert summary.norm_limit == np.inf


def test_a_few_rows_of_huge_norm_do_not_determine_the_scale() -> None:
    x = with_outliers()
    moments = Moments.of(x, "bfloat16")
    assert moments.within(0).mean_square_norm > 10 * moments.within(10).mean_square_norm
    assert moments.within(10).skipped == 3


def test_rows_with_a_nan_or_an_infinity_are_counted_separately() -> None:
    x = with_outliers()
    x[3, 4], x[9, 0] = np.nan, np.inf
    summary = Moments.of(x, "bfloat16").within(0)
    assert summary.skipped == 2
    assert np.isfinite(summary.mean).all()


def test_all_zero_rows_have_moments() -> None:
    summary = Moments.of(np.zeros((10, 4), np.float32), "float32").within(10)
    assert (summary.rows, summary.mean_square_norm, summary.median_norm) == (10, 0.0, 0.0)


def test_the_record_keeps_every_digit() -> None:
    moments = Moments.of(with_outliers(), "bfloat16")
    record = moments.to_record()
    again = type(record).model_validate_json(canonical_json(record.model_dump(mode="json"))).read(24)
    for field in ("bins", "counts", "sums", "squares"):
        assert np.array_equal(getattr(moments, field), getattr(again, field))
    with pytest.raises(CorruptError, match="bytes"):
        record.read(25)


def test_merged_windows_have_the_moments_of_all_rows() -> None:
    x = with_outliers()
    parts = [Moments.of(x[i : i + 777], "bfloat16") for i in range(0, len(x), 777)]
    merged, whole = Moments.merged(parts, 24), Moments.of(x, "bfloat16")
    assert np.array_equal(merged.bins, whole.bins)
    assert np.array_equal(merged.counts, whole.counts)
    np.testing.assert_allclose(merged.sums, whole.sums, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5000), max_size=6), st.sampled_from(["bfloat16", "float16", "float32"]))
def test_where_rows_are_cut_changes_no_bit(cuts: list[int], dtype: str) -> None:
    x = with_outliers().astype(NUMPY_DTYPES[dtype])
    x[11, 3] = np.nan
    builder = MomentsBuilder(24, dtype)
    for part in np.split(x, sorted(cuts)):
        builder.add(part, sort_by_norm(part, dtype))
    assert builder.moments().to_record() == Moments.of(x, dtype).to_record()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bins_are_those_of_float64_norms_of_any_dtype(dtype: str) -> None:
    x = normal_rows(500, 24).astype(NUMPY_DTYPES[dtype])
    moments = Moments.of(x, dtype)
    wide = x.astype(np.float64)
    bins, counts = np.unique(np.floor(8 * np.log2((wide * wide).sum(axis=1))), return_counts=True)
    assert moments.bins.tolist() == bins.tolist()
    assert moments.counts.tolist() == counts.tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("channels", [1, 7, 64, 129])
def test_compiled_sums_have_the_bits_of_the_plain_ones(channels: int, dtype: str) -> None:
    x = float_bits(normal_rows(203, channels).astype(NUMPY_DTYPES[dtype]), dtype)
    ours, plain = np.empty(203), np.empty(203)
    squared_norms(x, ours)
    squared_norms_plain(x, plain)
    assert np.array_equal(ours, plain)
    order, starts = np.random.default_rng(0).permutation(203), np.array([0, 1, 3, 10, 100, 190])
    slots = np.array([4, 0, 6, 1, 3])
    filled = [np.zeros((7, channels)) for _ in range(4)]
    binned_sums(x, order, starts, slots, *filled[:2])
    binned_sums_plain(x, order, starts, slots, *filled[2:])
    assert np.array_equal(filled[0], filled[2])
    assert np.array_equal(filled[1], filled[3])
    assert not filled[0][[2, 5]].any()
    np.testing.assert_array_less(0, filled[1][slots])


@given(st.floats(1e-300, 1e300))
def test_a_norm_lies_between_the_edges_of_its_bin(squared: float) -> None:
    number = int(bin_of(np.array([squared]))[0])
    assert bin_edge(number) <= squared < bin_edge(number + 1)
    assert number == pytest.approx(8 * np.log2(squared), abs=1 + 1e-6)


def test_there_are_eight_bins_an_octave_and_powers_of_two_are_edges() -> None:
    assert bin_of(np.array([1.0, 2.0, 4.0, 0.5])).tolist() == [0, 8, 16, -8]
    assert bin_edge(4) == pytest.approx(np.sqrt(2), rel=1e-15)
