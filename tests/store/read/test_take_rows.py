"""Rows by number and by token, and the tokens around them: the same rows as in stored order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.errors import NotFoundError
from gsae.store import Site, Store, open_store, seal
from gsae.tests.support.stores import BOS, make_store, normal_rows

CONTEXTS, CONTEXT_SIZE, D_IN = 150, 32, 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Several windows, chunks and a partial last chunk; row i of the site is `everything[source of i]`."""
    root = tmp_path_factory.mktemp("rows") / "store"
    return make_store(root, contexts=CONTEXTS, window_rows=512, chunk_rows=32, sites={"mlp.1": D_IN})


@pytest.fixture(scope="module")
def everything() -> torch.Tensor:
    rows = normal_rows(CONTEXTS * CONTEXT_SIZE, D_IN)
    return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)


def in_order(site: Site) -> tuple[np.ndarray, torch.Tensor]:
    sources, rows = zip(*site.in_order(100), strict=True)
    return np.concatenate(sources), torch.cat(rows)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_come_in_the_order_of_the_index(store: Store, data: st.DataObject) -> None:
    site = store.site("mlp.1")
    _, stored = in_order(site)
    asked = data.draw(st.lists(st.integers(-len(site), len(site) - 1), max_size=40))
    for index in (asked, np.array(asked, np.int32), torch.tensor(asked, dtype=torch.int64)):
        assert torch.equal(site[index], stored[torch.tensor(asked, dtype=torch.int64)])
    part = slice(*data.draw(st.tuples(*[st.one_of(st.none(), st.integers(-9, 700))] * 2)), data.draw(st.integers(1, 9)))
    assert torch.equal(site[part], stored[part])


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_one_row_and_every_row(store: Store, io: Any, split: Any) -> None:
    site = store.site("mlp.1", split, io)
    sources, stored = in_order(site)
    assert len(site) == site.rows == len(stored)
    assert torch.equal(site[:], stored)
    assert torch.equal(site[5], stored[5])
    assert torch.equal(site[np.int64(-1)], stored[-1])
    assert torch.equal(site[torch.arange(len(site)) % 3 == 0], stored[::3])
    assert np.array_equal(site.sources(slice(None)), sources)
    assert np.array_equal(site.sources([7, 3, 7]), sources[[7, 3, 7]])


@pytest.mark.parametrize("index", [10**6, [0, -(10**6)], 1.5, [[1]], "3", [True, False]])
def test_an_invalid_index_is_an_index_error(store: Store, index: Any) -> None:
    with pytest.raises(IndexError, match="Row"):
        store.site("mlp.1")[index]


def test_a_site_ends_like_any_sequence(store: Store) -> None:
    site = store.site("mlp.1", "heldout")
    assert sum(1 for _ in site) == site.rows


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_row_is_found_by_its_context_and_position(store: Store, everything: torch.Tensor, split: Any) -> None:
    site = store.site("mlp.1", split)
    sources, stored = in_order(site)
    shuffled = np.random.default_rng(0).permutation(len(sources))
    contexts, positions = np.divmod(sources[shuffled], CONTEXT_SIZE)
    assert torch.equal(site.at(contexts, positions), stored[shuffled])
    assert torch.equal(site.at(int(contexts[0]), int(positions[0])), everything[[sources[shuffled[0]]]])


def test_tokens_that_are_not_rows_of_the_split_are_errors(store: Store) -> None:
    train, heldout = store.site("mlp.1"), store.site("mlp.1", "heldout")
    context, position = np.divmod(int(heldout.sources(0)[0]), CONTEXT_SIZE)
    with pytest.raises(NotFoundError, match=rf"Token {position} of context {context} is no train row"):
        train.at(context, position)
    with pytest.raises(NotFoundError, match="Token 0 of context 0 is no train row"):  # BOS
        train.at(0, 0)
    with pytest.raises(NotFoundError, match="no position 32"):
        train.at(0, CONTEXT_SIZE)
    with pytest.raises(NotFoundError, match="context 5000"):
        train.at(5000, 3)


def test_tokens_around_a_row_are_those_of_its_context(store: Store) -> None:
    site, tokens = store.site("mlp.1"), store.tokens()
    rows = [3, 900, 3, site.rows - 1]
    found = site.tokens_around(rows, before=5, after=40)
    assert found.shape == (4, 46)
    assert found.dtype == np.int32
    for line, source in zip(found, site.sources(rows), strict=True):
        context, position = divmod(int(source), CONTEXT_SIZE)
        padded = np.concatenate([np.full(5, -1), tokens[context], np.full(40, -1)])
        assert np.array_equal(line, padded[position : position + 46])
    assert store.tokens_around(CONTEXT_SIZE, before=1, after=1).tolist() == [[-1, BOS, int(tokens[1, 1])]]
    with pytest.raises(NotFoundError, match="150 contexts"):
        store.tokens_around(CONTEXTS * CONTEXT_SIZE)


def test_the_rows_of_a_sealed_store_are_found_past_the_gaps(tmp_path: Path) -> None:
    whole = make_store(tmp_path / "s", contexts=100, window_rows=512, chunk_rows=32)
    gone = whole.site("mlp.1")[512:1024]
    sources = whole.site("mlp.1").sources(slice(None))
    (whole.path / "manifest.json").unlink()
    (whole.path / "shards" / "train-00001.json").unlink()
    seal(whole.path)
    site = open_store(whole.path).site("mlp.1")
    assert site.rows == whole.site("mlp.1").rows - len(gone)
    left = np.concatenate([sources[:512], sources[1024:]])
    contexts, positions = np.divmod(left, 32)
    assert torch.equal(site.at(contexts, positions), site[:])
    with pytest.raises(NotFoundError, match="is no train row"):
        site.at(*np.divmod(sources[600:601], 32))


def test_any_chunkful_of_rows_can_be_taken(store: Store) -> None:
    site = store.site("mlp.1")
    _, stored = in_order(site)
    for first in range(0, site.rows - 32, 32):
        assert torch.equal(site[first + 16 : first + 48], stored[first + 16 : first + 48])
