"""The document of a context: the one that most of its tokens are of, against counting them one by one."""

from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.store import open_stores
from gsae.store.read import store as store_module
from gsae.store.read.main_documents import main_documents
from gsae.tests.support.stores import make_store

SIZE, EOS = 8, 2


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    names=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    special=st.lists(st.booleans(), min_size=256, max_size=256),
)
@settings(deadline=None, max_examples=80)
def test_it_is_the_one_with_most_tokens_and_the_first_of_equals(
    lengths: list[int], names: list[int], special: list[bool]
) -> None:
    owners = [number for number, length in enumerate(lengths) for _ in range(length)]
    contexts = -(-len(owners) // SIZE)
    tokens = np.where(special[: contexts * SIZE], EOS, 7).astype(np.int32)
    tokens[len(owners) :] = EOS  # padding
    start = np.cumsum([0, *lengths[:-1]])
    ids = np.array(names[: len(lengths)]) * 10
    asked = np.arange(contexts)[::-1].copy()
    found = main_documents(asked, tokens.reshape(-1, SIZE)[asked], (EOS,), start, ids)
    for context, number in zip(asked.tolist(), found.tolist(), strict=True):
        inside = range(context * SIZE, min(len(owners), (context + 1) * SIZE))
        own = [int(ids[owners[place]]) for place in inside if tokens[place] != EOS]
        if own:
            assert number == Counter(own).most_common(1)[0][0]  # of equals, the one that was met first
        else:
            assert number in set(ids.tolist())


def test_a_store_reads_its_contexts_a_few_at_a_time(tmp_path: Path, monkeypatch) -> None:
    store = make_store(tmp_path / "store", contexts=40, parts=4)
    contexts = np.array([39, 0, 3, 4, 17])
    assert store.main_documents(contexts).tolist() == [9, 0, 0, 1, 4]
    monkeypatch.setattr(store_module, "MAIN_DOCUMENTS_TOKENS", 64)
    assert store.main_documents(contexts).tolist() == [9, 0, 0, 1, 4]
    assert store.main_documents(contexts[:0]).tolist() == []


def test_stores_of_one_text_share_its_documents_and_stores_of_others_do_not(tmp_path: Path) -> None:
    first = make_store(tmp_path / "a", contexts=12, parts=4)
    same = make_store(tmp_path / "b", contexts=12, parts=2, dataset=first.plan.dataset.model_copy())
    moved = first.plan.dataset.model_copy(update={"skip_documents": 5, "shuffle_seed": 1})
    later = make_store(tmp_path / "c", contexts=8, parts=4, dataset=moved, seed=5)
    other = make_store(tmp_path / "d", contexts=4, dataset=moved.model_copy(update={"id": "another"}), seed=6)
    together = open_stores([each.path for each in (first, same, later, other)])
    found = together.main_documents(np.arange(36))
    parts = [found[:12], found[12:24], found[24:32], found[32:]]
    assert parts[0].tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert parts[1].tolist() == np.repeat([0, 1, 2, 3, 4, 5], 2).tolist()
    assert parts[2].tolist() == np.repeat([0, 1], 4).tolist()
    assert parts[3].tolist() == [6, 7, 8, 9]
