"""Reading: every row once an epoch, another order each time, and the same rest from any position."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.errors import CorruptError, IncompatibleError, NotFoundError, UsageError
from gsae.store import Store, open_store
from gsae.store.read.read_order import Shuffle, mixed, mixes, schedule, window_order
from gsae.tests.support.stores import make_store, normal_rows


def as_keys(rows: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.view(torch.int16).numpy()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Small chunks, so that mixes, windows and a partial last chunk all occur."""
    return make_store(
        tmp_path_factory.mktemp("reader") / "store", contexts=200, window_rows=512, chunk_rows=32, sites={"mlp.1": 16}
    )


@pytest.mark.parametrize("options", [{}, {"mix": 3, "open_windows": 2}, {"mix": 1, "open_windows": 1}])
def test_every_row_is_seen_exactly_once_an_epoch(store: Store, options: dict[str, int]) -> None:
    site = store.site("mlp.1")
    stored = sorted(key for _, rows in site.in_order() for key in as_keys(rows))
    batches = list(site.batches(100, **options))
    assert sorted(key for rows in batches for key in as_keys(rows)) == stored
    assert {len(rows) for rows in batches[:-1]} == {100}
    assert batches[0].dtype == torch.bfloat16


def test_seed_and_epoch_change_the_order_and_nothing_else_does(store: Store) -> None:
    site = store.site("mlp.1")

    def run(**options: Any) -> torch.Tensor:
        return torch.cat(list(site.batches(100, mix=4, open_windows=3, **options)))

    assert torch.equal(run(seed=1), run(seed=1, threads=1))
    assert torch.equal(
        run(seed=1), torch.cat(list(store.site("mlp.1", io="pread").batches(100, seed=1, mix=4, open_windows=3)))
    )
    assert not torch.equal(run(seed=1), run(seed=2))
    two = run(seed=1, epochs=2)
    assert torch.equal(two[: site.rows], run(seed=1))
    assert not torch.equal(two[: site.rows], two[site.rows :])
    assert sorted(as_keys(two[: site.rows])) == sorted(as_keys(two[site.rows :]))


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 6), st.integers(0, 200), st.sampled_from([0.0, 1.2]))
def test_stopping_anywhere_and_resuming_gives_the_same_remaining_batches(
    store: Store, size: int, mix: int, opened: int, stop: int, multiple: float
) -> None:
    options: dict[str, Any] = {
        "epochs": 2, "mix": mix, "open_windows": opened, "seed": 3, "max_norm_multiple": multiple, "threads": 1
    }  # fmt: skip
    whole = list(store.site("mlp.1").batches(size, **options))
    stop = min(stop, len(whole))
    with store.site("mlp.1").batches(size, **options) as batches:
        list(itertools.islice(batches, stop))
        state = batches.state_dict()
    with store.site("mlp.1").batches(size, state=state, **options) as rest:
        found = list(rest)
        assert len(found) == len(whole) - stop
        assert all(torch.equal(a, b) for a, b in zip(found, whole[stop:], strict=True))
        expected = 2 * store.site("mlp.1").moments.within(multiple).skipped
        assert rest.skipped == expected


@pytest.mark.parametrize("multiple", [1.0, 1.3, 10.0])
def test_rows_left_out_for_their_norm_are_those_that_the_moments_leave_out(store: Store, multiple: float) -> None:
    site = store.site("mlp.1")
    summary = site.moments.within(multiple)
    rows = torch.cat(list(site.batches(64, max_norm_multiple=multiple))).double()
    assert len(rows) == summary.rows
    assert rows.norm(dim=1).max() < summary.norm_limit
    np.testing.assert_allclose(rows.mean(dim=0).numpy(), summary.mean, rtol=1e-12, atol=1e-14)
    assert rows.square().sum(dim=1).mean().item() == pytest.approx(summary.mean_square_norm, rel=1e-12)


def test_rows_with_nan_are_skipped_and_counted(tmp_path: Path) -> None:
    def rows(n: int, d: int) -> np.ndarray:
        x = normal_rows(n, d)
        x[::50, 1] = np.nan
        return x

    site = make_store(tmp_path / "s", rows=rows).site("mlp.1")
    with site.batches(128) as batches:
        kept = torch.cat(list(batches))
        assert torch.isfinite(kept).all()
        assert batches.skipped == site.rows - len(kept) == site.moments.non_finite > 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_a_schedule_reads_every_chunk_once_with_bounded_open_windows(
    chunks: list[int], opened: int, seed: int, epoch: int
) -> None:
    picks = list(schedule(chunks, Shuffle(seed, 4, opened), epoch))
    assert sorted((p.window, p.chunk) for p in picks) == [(w, c) for w, n in enumerate(chunks) for c in range(n)]
    live: set[int] = set()
    for pick in picks:
        live.add(pick.window)
        assert len(live) <= opened
        if pick.last:
            live.remove(pick.window)
    assert not live


@settings(max_examples=50, deadline=None)
@given(chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6), mix=st.integers(1, 40))
def test_the_mixes_of_an_epoch_are_the_fewest_that_the_option_allows_and_alike(chunks: list[int], mix: int) -> None:
    found = [len(each.picks) for each in mixes(chunks, Shuffle(3, mix, 2), 1, (0, 0))]
    assert sum(found) == sum(chunks)
    assert len(found) == -(-sum(chunks) // mix)
    assert max(found) <= mix
    assert max(found) - min(found) <= 1


def test_each_epoch_and_each_seed_opens_the_windows_in_another_order() -> None:
    orders = [window_order(64, Shuffle(seed, 4, 4), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_of_reading_never_changes() -> None:
    """Runs are resumed and repeated with later versions."""
    first, second = mixes([3, 2, 4], Shuffle(5, 5, 2), 1, (0, 0))
    picks = [(pick.window, pick.chunk) for pick in (*first.picks, *second.picks)]
    assert picks == [(2, 0), (2, 1), (0, 2), (0, 1), (0, 0), (1, 1), (1, 0), (2, 2), (2, 3)]
    assert mixed(8, Shuffle(5, 5, 2), second).tolist() == [3, 1, 2, 4, 5, 6, 7, 0]


def test_batches_mix_contexts_and_windows(store: Store) -> None:
    """A batch's rows come from all over the store, not from neighbouring places."""
    where = {k: s for source, x in store.site("mlp.1").in_order() for k, s in zip(as_keys(x), source, strict=True)}
    positions = [np.mean([where[k] for k in as_keys(batch)]) for batch in store.site("mlp.1").batches(256)][:-1]
    spread = np.std(list(where.values()))
    assert np.std(positions) < 3 * spread / np.sqrt(256)


@pytest.mark.parametrize("codec", ["planes", "zstd", "none"])
def test_the_digest_and_the_rows_do_not_depend_on_the_codec(tmp_path: Path, codec: str) -> None:
    made, plain = make_store(tmp_path / "a", codec=codec), make_store(tmp_path / "b")
    assert made.digest == plain.digest
    for a, b in zip(made.site("mlp.1").batches(100), plain.site("mlp.1").batches(100), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_are_kept_as_they_are(tmp_path: Path, dtype: str) -> None:
    def rows(n: int, d: int) -> np.ndarray:
        return normal_rows(n, d).astype(dtype)

    store = make_store(tmp_path / "s", dtype=dtype, codec="zstd", rows=rows)
    every = rows(140 * 32, 32)
    for source, x in store.site("mlp.1").in_order():
        assert np.array_equal(x.numpy(), every[source])


def test_errors_list_what_exists(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"Site 'mlp\.40' is not in .*\. It has: mlp\.1\."):
        store.site("mlp.40")
    with pytest.raises(NotFoundError, match="is no gsae store"):
        open_store(tmp_path)
    with pytest.raises(UsageError, match="at least 1"):
        store.site("mlp.1").batches(0)
    with pytest.raises(UsageError, match="position has epoch, group, offset, skipped"):
        store.site("mlp.1").batches(10, state={"row": 4})


def test_an_unfinished_store_is_refused_with_its_progress(tmp_path: Path) -> None:
    whole = make_store(tmp_path / "s")
    (whole.path / "manifest.json").unlink()
    (whole.path / "shards" / "train-00001.json").unlink()
    with pytest.raises(IncompatibleError, match=r"not finished: 4 of 5 windows are there"):
        open_store(whole.path)


def test_a_changed_byte_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", contexts=60)
    file = store.path / "train/mlp.1/c/0/0"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)
    with pytest.raises(CorruptError, match=r"train/mlp\.1/c/0/0: chunk 0: the crc32c"):
        list(store.site("mlp.1").batches(100))
    file.write_bytes(data[:-7])
    with pytest.raises(CorruptError, match=r"c/0/0: the file has \d+ bytes; \d+ were written"):
        list(store.site("mlp.1").batches(100))


def test_a_newer_format_is_refused_and_a_newer_minor_one_read(tmp_path: Path) -> None:
    from gsae.store.format.json_files import canonical_json, sha256

    store = make_store(tmp_path / "s")
    path = store.path / "manifest.json"
    body = store.manifest.model_dump(mode="json", exclude={"sha256"})

    def write(**changed: Any) -> None:
        new = body | changed
        path.write_bytes(canonical_json(new | {"sha256": sha256(canonical_json(new))}))

    write(schema_version="1.7", moon="full")
    assert open_store(store.path).manifest.model_extra == {"moon": "full"}
    write(schema_version="2.0")
    with pytest.raises(IncompatibleError, match=r"format 2\.0; this gsae reads up to 1\.0"):
        open_store(store.path)
    write(windows=[])
    with pytest.raises(CorruptError, match="manifest"):
        open_store(store.path)
