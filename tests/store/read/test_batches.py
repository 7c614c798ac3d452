"""Batches in use: memory, copies, threads, workers of a DataLoader, pickles."""

import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gsae.errors import NotFoundError, SpaceError, UsageError
from gsae.store import Batches, Store
from gsae.store.places.shard import ShardReader
from gsae.store.read.batch_memory import Slots, slots_needed
from gsae.store.read.read_order import Mix, Shuffle, mixed, shuffle_places, shuffle_places_plain
from gsae.store.read.reading import Reading, ReadOptions
from gsae.store.read.shard_file import ShardFile
from gsae.tests.support.selection import mostly_slow
from gsae.tests.support.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four windows of 16 chunks and a part of one."""
    return make_store(
        tmp_path_factory.mktemp("batches") / "store", contexts=90, window_rows=512, chunk_rows=32, sites={"mlp.1": 16}
    )


def clones(batches: Any) -> list[torch.Tensor]:
    return [rows.clone() for rows in batches]


@pytest.mark.parametrize("size", mostly_slow([1, 7, 64, 1000, 10**6], 1, 64, 10**6))
@pytest.mark.parametrize("multiple", [0.0, 1.2])
def test_keeping_every_batch_gives_the_same_rows_as_dropping_each(store: Store, size: int, multiple: float) -> None:
    """A consumer that holds batches gets copies, so the rows that it holds never change."""
    options: dict[str, Any] = {"mix": 4, "open_windows": 2, "epochs": 2, "max_norm_multiple": multiple}
    dropped = clones(store.site("mlp.1").batches(size, **options))
    held = list(store.site("mlp.1").batches(size, **options))
    assert all(torch.equal(a, b) for a, b in zip(held, dropped, strict=True))


def test_the_memory_of_a_deleted_batch_is_used_again(store: Store) -> None:
    seen = set()
    with store.site("mlp.1").batches(64, mix=4, epochs=20) as batches:
        for rows in batches:
            seen.add(rows.data_ptr())
        assert len(seen) <= slots_needed(128, 64, kept=2)
        assert batches.memory == slots_needed(128, 64, kept=2) * 64 * 16 * 2


def test_a_part_of_a_batch_keeps_its_memory(store: Store) -> None:
    with store.site("mlp.1").batches(64, mix=2, epochs=4) as batches:
        part = next(batches)[3:5]
        before = part.clone()
        for _ in itertools.islice(batches, 60):
            pass
        assert torch.equal(part, before)


@given(st.integers(1, 5), st.integers(1, 4), st.lists(st.integers(0, 5), max_size=40))
def test_slots_are_lent_until_the_last_view_is_gone(slots: int, kept: int, drops: list[int]) -> None:
    memory = Slots(slots + kept, 2, 3, "bfloat16", kept, pinned=False)
    held: list[torch.Tensor] = []
    for number, drop in enumerate(drops):
        memory.release()
        slot = memory.take()
        memory.rows[2 * slot : 2 * slot + 2] = number
        if number % 2:
            memory.prepare(slot)
        held.append(memory.lend(slot, 2 - number % 3 // 2).view(torch.int16)[-1:])
        if drop < len(held):
            del held[drop]
        assert all(len(rows.unique()) == 1 for rows in held)
    assert sorted({int(rows[0, 0]) for rows in held}) == sorted(int(rows[0, 0]) for rows in held)


def test_memory_that_cannot_be_allocated_is_one_clear_error(store: Store) -> None:
    with pytest.raises(SpaceError, match="Use smaller batches or a smaller mix"):
        next(store.site("mlp.1").batches(2**58, epochs=None))


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 9), st.integers(0, 5), st.integers(0, 3))
def test_a_mix_is_permuted_the_same_way_compiled_and_plain(rows: int, seed: int, number: int, epoch: int) -> None:
    places = mixed(rows, Shuffle(seed, 1, 1), Mix(epoch, number, ()))
    assert sorted(places) == list(range(rows))
    halves = np.random.default_rng(seed).integers(0, 2**32, rows, np.uint32)
    compiled, plain = np.arange(rows), np.arange(rows)
    shuffle_places(halves, compiled)
    shuffle_places_plain(halves, plain)
    assert np.array_equal(compiled, plain)


def test_the_order_of_a_mix_never_changes() -> None:
    assert mixed(10, Shuffle(0, 1, 1), Mix(0, 0, ())).tolist() == [0, 4, 1, 7, 9, 6, 3, 8, 2, 5]


def test_the_order_of_a_mix_is_uniform() -> None:
    """Every row goes to every place equally often."""
    counts = np.zeros((6, 6))
    for number in range(6000):
        counts[np.arange(6), mixed(6, Shuffle(0, 1, 1), Mix(0, number, ()))] += 1
    assert np.square(counts - 1000).sum() / 1000 < 25 + 5 * np.sqrt(2 * 25)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_yields_the_same_batches(store: Store, workers: int) -> None:
    site = store.site("mlp.1")
    expected = clones(site.batches(100, mix=3, epochs=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads
        found = clones(DataLoader(site.batches(100, mix=3, epochs=2), batch_size=None, num_workers=workers))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0].dtype == torch.bfloat16


def test_two_workers_are_refused_because_each_would_read_every_row(store: Store) -> None:
    loader = DataLoader(store.site("mlp.1").batches(100), batch_size=None, num_workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loading: Any = iter(loader)
    with pytest.raises(UsageError, match="num_workers 0 or 1"):
        next(loading)
    loading._shutdown_workers()


@pytest.mark.parametrize("already", [0, 3])
def test_batches_pickle_as_what_is_still_to_come(store: Store, already: int) -> None:
    expected = clones(store.site("mlp.1").batches(100))
    with store.site("mlp.1").batches(100) as batches:
        for _ in range(already):
            next(batches)
        rest = clones(pickle.loads(pickle.dumps(batches)))
        assert all(torch.equal(a, b) for a, b in zip(rest, expected[already:], strict=True))
        assert torch.equal(next(batches), expected[already])


def test_a_forked_process_continues_with_new_threads(store: Store) -> None:
    expected = clones(store.site("mlp.1").batches(100))
    batches = store.site("mlp.1").batches(100)
    next(batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        rest = clones(batches)
        same = len(rest) == len(expected) - 1 and all(map(torch.equal, rest, expected[1:]))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all(map(torch.equal, clones(batches), expected[1:]))


def reading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("gsae-")]


def test_no_thread_is_left_when_batches_are_read_closed_or_forgotten(store: Store) -> None:
    site = store.site("mlp.1")
    list(site.batches(100))
    with site.batches(100, epochs=None) as batches:
        next(batches)
        batches.close()
        with pytest.raises(StopIteration):
            next(batches)
    assert not reading_threads()
    forgotten = site.batches(100, epochs=None)
    next(forgotten)
    assert reading_threads()
    del forgotten
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("gsae-"):
            thread.join(timeout=10)
    assert not reading_threads()


@pytest.mark.slow
def test_a_process_ends_though_batches_are_left_open(store: Store) -> None:
    code = (
        "from gsae.store import open_store\n"
        f"batches = open_store({str(store.path)!r}).site('mlp.1').batches(64, epochs=None)\n"
        "print(len(next(batches)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.strip(), done.stderr) == ("64", "")


def test_an_error_in_the_middle_comes_once_and_ends_the_batches(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", contexts=60, window_rows=512)
    (store.path / "train/mlp.1/c/1/0").unlink()
    batches = store.site("mlp.1").batches(10, mix=1, open_windows=1)
    with pytest.raises(NotFoundError, match=r"c/1/0 is missing"):
        list(batches)
    assert list(batches) == []
    assert not reading_threads()


class SlowAtFirst(ShardFile):
    """A file with a slow first chunk; `closed` records whether the file was closed before that chunk was decoded."""

    closed: ClassVar[list[bool]] = []

    def open(self) -> ShardReader:
        shard, others = super().open(), itertools.count()
        decode = shard.decode_into

        def decode_into(*chunk: Any) -> None:
            if next(others) == 0:
                deadline = time.monotonic() + 0.5
                while not shard.closed and time.monotonic() < deadline:
                    time.sleep(0.01)
                self.closed.append(shard.closed)
            decode(*chunk)

        shard.decode_into = decode_into  # type: ignore[method-assign]
        return shard


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_file_stays_open_until_the_slowest_thread_has_decoded_from_it(
    store: Store, io: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last chunks of a window may be decoded, by other threads, before one of an earlier group is."""
    monkeypatch.setattr(SlowAtFirst, "closed", [])
    site = store.site("mlp.1")
    files = store.files("mlp.1", "train", io)
    slow = tuple(SlowAtFirst(file.place, file.spec, file.number, file.entry, io) for file in files)
    options = ReadOptions(64, mix=8, open_windows=1, threads=2)
    rows = torch.cat(clones(Batches(Reading(slow, options, None))))
    expected = torch.cat(clones(site.batches(64, mix=8, open_windows=1)))
    assert SlowAtFirst.closed == [False] * len(files)
    assert torch.equal(rows, expected)


def test_a_position_of_another_stream_is_refused(store: Store) -> None:
    state = {"epoch": 0, "group": 0, "offset": 10**6, "skipped": 0}
    with pytest.raises(UsageError, match="is no position of these batches"):
        next(store.site("mlp.1").batches(10, state=state))


def test_batches_are_an_iterator_over_one_pass(store: Store) -> None:
    batches = store.site("mlp.1").batches(1000)
    assert isinstance(batches, Batches)
    assert iter(batches) is batches
    assert len(list(batches)) > 0
    assert list(batches) == []


def test_an_unsupported_device_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="Device 'xpu' cannot be used"):
        store.site("mlp.1").batches(10, device="xpu")
