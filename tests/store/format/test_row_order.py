"""Which rows exist and in which order: pure functions, checked by counting and by properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.store.format import row_order as order
from gsae.store.format.row_order import Stream


def test_a_permutation_is_the_stable_argsort_of_philox_words() -> None:
    key, counter = np.array([9, 4], np.uint64), np.array([0, 0, 7, 2], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(1000)
    expected = sorted(range(1000), key=lambda i: (words[i], i))
    assert order.permutation(1000, 9, Stream.TRAIN_ROWS, 7, 2).tolist() == expected


def test_permutations_never_change() -> None:
    assert order.permutation(10, 0, Stream.TRAIN_ROWS).tolist() == [5, 6, 4, 0, 3, 2, 8, 1, 9, 7]
    assert order.word(3, Stream.HELDOUT, 12) == order.words(1, 3, Stream.HELDOUT, 12)[0]


def test_seed_stream_index_and_epoch_each_change_the_order() -> None:
    seen = {
        tuple(order.permutation(50, seed, stream, index, epoch))
        for seed in (0, 1)
        for stream in (Stream.TRAIN_ROWS, Stream.READ_MIX)
        for index in (0, 1)
        for epoch in (0, 1)
    }
    assert len(seen) == 16


def test_special_tokens_and_dropped_positions_are_never_rows() -> None:
    tokens = np.array([[1, 5, 2, 6], [1, 1, 7, 8]], np.int32)
    mask = order.row_mask(tokens, (1, 2), (3, 99))
    assert mask.tolist() == [[False, True, False, False], [False, False, True, False]]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=60),
    st.integers(1, 16),
    st.integers(0, 5),
    st.one_of(st.none(), st.integers(1, 300)),
)
def test_windows_hold_every_row_of_a_split_once_whatever_the_counts(
    counts: list[int], window_rows: int, seed: int, budget: int | None
) -> None:
    context_size = 9
    mask = np.arange(context_size)[None, :] < np.array(counts)[:, None]
    splits = (np.arange(len(counts)) % 3 == 0).astype(np.uint8)
    for split in order.SPLITS:
        laid = order.layout(splits, np.array(counts), split, seed, window_rows, budget)
        found = []
        for w in range(laid.windows):
            window = laid.window(w)
            sources = window.sources(mask[window.contexts])
            assert len(sources) == window.rows == min(window_rows, laid.rows - w * window_rows)
            stored = order.stored_order(window, split, seed)
            assert np.array_equal(order.inverse(stored)[stored], np.arange(window.rows))
            found += sources.tolist()
        value = order.SPLITS.index(split)
        every = [c * context_size + p for c, n in enumerate(counts) if splits[c] == value for p in range(n)]
        assert len(set(found)) == len(found) == (len(every) if budget is None else min(budget, len(every)))
        assert set(found) <= set(every)


@given(st.integers(0, 300), st.integers(1, 40))
def test_batches_cover_a_window_in_order_with_sizes_that_differ_by_at_most_one(contexts: int, size: int) -> None:
    parts = list(order.context_batches(contexts, size))
    sizes = [part.stop - part.start for part in parts]
    assert len(parts) == -(-contexts // size)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(contexts))
    assert not sizes or (max(sizes) <= size and max(sizes) - min(sizes) <= 1)


@pytest.mark.parametrize("split", order.SPLITS)
def test_a_window_is_a_random_sample_of_contexts(split: order.Split) -> None:
    splits = np.full(4000, order.SPLITS.index(split), np.uint8)
    laid = order.layout(splits, np.full(4000, 10), split, 0, 1 << 12, None)
    first = laid.window(0).contexts
    assert abs(first.mean() - 2000) < 5 * 4000 / np.sqrt(12 * len(first))
