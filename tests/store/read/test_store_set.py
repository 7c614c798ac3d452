"""Several stores read as one set: the same interface, every row of all stores, and another digest."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gsae.errors import IncompatibleError, NotFoundError, UsageError
from gsae.store import ModelSource, Moments, Store, StoreSet, open_stores
from gsae.tests.support.stores import make_store, normal_rows


def other_rows(rows: int, d_in: int) -> np.ndarray:
    return normal_rows(rows, d_in)[::-1].copy()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store, StoreSet]:
    """Two stores of different sizes, contexts, windows, chunks and codecs, and both as one set."""
    folder = tmp_path_factory.mktemp("several")
    a = make_store(folder / "a", contexts=60, window_rows=256, chunk_rows=32)
    b = make_store(
        folder / "b",
        contexts=90,
        context_size=24,
        window_rows=512,
        chunk_rows=64,
        codec="zstd",
        seed=3,
        rows=other_rows,
    )
    both = open_stores([folder / "a", folder / "b"])
    assert isinstance(both, StoreSet)
    return a, b, both


def keys(rows: torch.Tensor) -> Counter[bytes]:
    return Counter(row.tobytes() for row in rows.view(torch.int16).numpy())


def test_every_row_of_all_stores_is_seen_once_and_windows_are_mixed(pair: tuple[Store, Store, StoreSet]) -> None:
    a, b, both = (store.site("mlp.1") for store in pair)
    assert both.rows == a.rows + b.rows
    rows = torch.cat(list(both.batches(100, mix=4, open_windows=3)))
    assert keys(rows) == keys(a[:]) + keys(b[:])
    first = keys(rows[: len(rows) // 2])
    assert 0.2 < sum((first & keys(a[:])).values()) / a.rows < 0.8


def test_stopping_and_resuming_a_set_gives_the_same_remaining_batches(pair: tuple[Store, Store, StoreSet]) -> None:
    site = pair[2].site("mlp.1")
    whole = list(site.batches(70, seed=2, mix=3, max_norm_multiple=1.2))
    with site.batches(70, seed=2, mix=3, max_norm_multiple=1.2) as batches:
        for _ in range(11):
            next(batches)
        rest = list(site.batches(70, seed=2, mix=3, max_norm_multiple=1.2, state=batches.state_dict()))
    assert all(map(torch.equal, rest, whole[11:]))
    assert len(rest) == len(whole) - 11


def test_moments_are_those_of_all_rows(pair: tuple[Store, Store, StoreSet]) -> None:
    site = pair[2].site("mlp.1")
    oracle = Moments.of(site[:].view(torch.int16).numpy().view(np.uint16), "bfloat16")
    assert np.array_equal(site.moments.counts, oracle.counts)
    np.testing.assert_allclose(site.moments.sums, oracle.sums, rtol=1e-12, atol=1e-9)
    assert site.moments.within(1.2).rows == sum(len(x) for x in site.batches(64, max_norm_multiple=1.2))


def test_tokens_and_places_are_numbered_through_the_stores(pair: tuple[Store, Store, StoreSet]) -> None:
    a, b, both = pair
    site = both.site("mlp.1")
    tokens = np.concatenate([a.tokens().ravel(), b.tokens().ravel()])
    assert np.array_equal(site.tokens_around(slice(None), 0, 0)[:, 0], tokens[site.sources(slice(None))])
    sources, rows = zip(*site.in_order(), strict=True)
    assert np.array_equal(np.concatenate(sources), site.sources(slice(None)))
    assert torch.equal(torch.cat(rows), site[:])
    of_b = int(b.site("mlp.1").sources(9)[0])
    context, position = divmod(of_b, 24)
    assert torch.equal(site.at([60 + context], [position])[0], b.site("mlp.1")[9])
    with pytest.raises(NotFoundError):
        site.at(60 + 90, 3)


def test_a_set_has_another_digest(pair: tuple[Store, Store, StoreSet]) -> None:
    a, b, both = pair
    assert both.digest == hashlib.sha256((a.digest + b.digest).encode()).hexdigest()
    assert open_stores([a.path]).digest == a.digest


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"dtype": "float16", "codec": "zstd", "rows": lambda n, d: normal_rows(n, d).astype("float16")},
            "the dtype is",
        ),
        ({"model": {"revision": "v2"}}, "the model revision is None and v2"),
        ({"model": {"weights_sha256": "1" * 64}}, "the hash of the model's weights"),
    ],
)
def test_stores_that_differ_are_refused_naming_the_difference(
    pair: tuple[Store, Store, StoreSet], tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    a = pair[0]
    if "model" in fields:
        fields = {"model": ModelSource(**(a.plan.model.model_dump() | fields["model"]))}
    make_store(tmp_path / "c", contexts=20, **fields)
    with pytest.raises(IncompatibleError, match=says):
        open_stores([a.path, tmp_path / "c"])


def test_a_site_must_be_in_all_stores_and_of_one_width(pair: tuple[Store, Store, StoreSet], tmp_path: Path) -> None:
    a = pair[0]
    make_store(tmp_path / "wide", contexts=20, sites={"mlp.1": 40})
    make_store(tmp_path / "other", contexts=20, sites={"mlp.2": 32})
    with pytest.raises(IncompatibleError, match=r"'out', 32.* 'out', 40"):
        open_stores([a.path, tmp_path / "wide"]).site("mlp.1")
    with pytest.raises(NotFoundError, match=r"mlp\.1.*It has: mlp\.2"):
        open_stores([a.path, tmp_path / "other"]).site("mlp.1")
    with pytest.raises(UsageError, match="given twice"):
        open_stores([a.path, a.path])
    with pytest.raises(UsageError, match="No store"):
        open_stores([])


def test_a_run_trains_from_a_set_and_resumes(pair: tuple[Store, Store, StoreSet], tmp_path: Path) -> None:
    from gsae.train import RunConfig, load_sae, parse_sae, train

    site = pair[2].site("mlp.1")
    run = RunConfig(site="mlp.1", batch_size=64, steps=8, saes=parse_sae("gated width=32 l1=0.1"), max_norm_multiple=3)
    train(site, run, tmp_path / "run")
    (folder,) = (tmp_path / "run" / "saes").iterdir()
    assert load_sae(folder).metadata["store_digest"] == pair[2].digest
    train(site, run, tmp_path / "run")
