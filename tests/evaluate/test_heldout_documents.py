"""Held-out documents: which contexts are of which, sums by them, and when there are too few of them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.evaluate import HeldoutDocuments, few_documents
from gsae.evaluate.heldout_documents import FEW_DOCUMENTS, sum_by
from gsae.tests.support.stores import make_store


def test_contexts_of_a_document_that_was_cut_have_one_index(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", contexts=90, parts=3)  # documents 0 to 29; 3, 10, 17, 24 are held out
    held = HeldoutDocuments.of(store)
    assert held.count == 4
    assert held.contexts.tolist() == [9, 10, 11, 30, 31, 32, 51, 52, 53, 72, 73, 74]
    assert held.document.tolist() == np.repeat([0, 1, 2, 3], 3).tolist()
    assert held.of_contexts(np.array([73, 9, 32])).tolist() == [3, 0, 1]


def test_a_store_without_held_out_contexts_has_no_documents_of_them(tmp_path: Path) -> None:
    held = HeldoutDocuments.of(make_store(tmp_path / "store", contexts=3, heldout_rows=0))
    assert (held.count, len(held.contexts)) == (0, 0)


@given(index=st.lists(st.integers(0, 4), max_size=20), whole=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_sums_keep_the_dtype_and_add_up_each_index(index: list[int], whole: bool, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(3, len(index))) * 10
    values = values.astype(np.int64) if whole else values
    found = sum_by(np.array(index, np.int64), 5, values)
    assert (found.shape, found.dtype) == ((3, 5), values.dtype)
    for number in range(5):
        assert np.allclose(found[:, number], values[:, np.array(index, np.int64) == number].sum(1))


@pytest.mark.parametrize(
    ("count", "ran", "said"),
    [
        (None, None, None),
        (None, 3, None),
        (FEW_DOCUMENTS, None, None),
        (FEW_DOCUMENTS, FEW_DOCUMENTS, None),
        (0, None, "No held-out documents: nothing can be evaluated; harvest with a larger --heldout or more text."),
        (1, 1, "Only 1 held-out document: intervals over documents are rough below 50; harvest with a larger"),
        (49, 2, "Only 49 held-out documents: intervals over documents are rough below 50; harvest with a larger"),
        (1200, 49, "Only 49 of 1,200 held-out documents ran through the language model: intervals of its scores are"),
    ],
)
def test_fewer_than_50_documents_are_said(count: int | None, ran: int | None, said: str | None) -> None:
    found = few_documents(count, ran)
    assert (found is None) == (said is None)
    assert found is None or (found.startswith(said or "") and "\n" not in found)
