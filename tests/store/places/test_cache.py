"""Remote stores read through a cache: files are fetched once, room is bounded, and files in use are never removed."""

import fcntl
import os
import pickle
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gsae.errors import CorruptError, NotFoundError, SpaceError, UsageError
from gsae.store import Store, open_store
from gsae.store.format.json_files import sha256
from gsae.store.format.manifest import FileEntry
from gsae.store.places.cache import Cache
from gsae.store.places.folder import Folder
from gsae.tests.support.children import files, finish, start
from gsae.tests.support.sharing import SITE, assert_every_row_is_read, counted, fetch_for_ever
from gsae.tests.support.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Some 26 train windows of 16 chunks."""
    root = tmp_path_factory.mktemp("cache") / "store"
    return make_store(root, contexts=520, window_rows=512, chunk_rows=32, sites={SITE: 16})


@pytest.fixture
def url(store: Store) -> str:
    return f"file://{store.path}"


@pytest.fixture
def source(tmp_path: Path) -> Folder:
    """Ten files of 1,000 bytes."""
    for i in range(10):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / f"source/{i}").write_bytes(bytes([i]) * 1000)
    return Folder(tmp_path / "source")


def entry_of(source: Folder, number: int) -> FileEntry:
    data = source.read(str(number))
    return FileEntry(path=str(number), size=len(data), sha256=sha256(data))


def held(cache: Cache, source: Folder) -> list[int]:
    """Return which of the ten files the cache has."""
    return [i for i in range(10) if (cache.folder / "shards" / entry_of(source, i).sha256).exists()]


def use(cache: Cache, source: Folder, number: int) -> None:
    os.close(cache.open(entry_of(source, number), source)[1])


@pytest.fixture
def hour(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Set the times of uses an hour apart, because the clock of a file system may be coarse."""
    now = iter(range(10**9, 2 * 10**9, 3600))
    touch = os.utime
    monkeypatch.setattr(os, "utime", lambda path: touch(path, (at := next(now), at)))
    return touch


def test_a_remote_store_reads_like_a_local_one(store: Store, url: str, tmp_path: Path) -> None:
    remote = open_store(url, Cache(tmp_path / "cache"))
    assert (remote.name, remote.digest) == (url, store.digest)
    options: dict[str, Any] = {"seed": 3, "epochs": 2, "mix": 4, "open_windows": 5}
    ours, theirs = (each.site(SITE).batches(100, **options) for each in (pickle.loads(pickle.dumps(remote)), store))
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert np.array_equal(remote.tokens(), store.tokens())
    assert np.array_equal(remote.documents()["start"], store.documents()["start"])
    for (a, x), (b, y) in zip(remote.site(SITE).in_order(), store.site(SITE).in_order(), strict=True):
        assert np.array_equal(a, b)
        assert torch.equal(x, y)


def kept_bytes(cache: Path) -> int:
    """Bytes of the finished files of a cache that a reader's thread may be changing at this moment."""
    total = 0
    for path in cache.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() and "fetching" not in path.parts else 0
    return total


def test_an_epoch_with_a_cache_of_a_quarter_of_the_store_fetches_each_shard_once(
    store: Store, url: str, tmp_path: Path
) -> None:
    site, log = store.site(SITE), tmp_path / "log"
    sizes = store.file_sizes(store.array(site.spec, "train"), "train")
    room, seen = sum(sizes) // 4, []
    cache = counted(tmp_path / "cache", log, room)
    assert room >= 6 * max(sizes)
    rows = 0
    for batch in open_store(url, cache).site(SITE).batches(64, mix=2, open_windows=2):
        rows += len(batch)
        seen.append(kept_bytes(tmp_path / "cache"))
    assert rows == site.rows
    assert Counter(log.read_text().split()) == {f"train/{SITE}/c/{w}/0": 1 for w in range(len(sizes))}
    assert max(seen) <= room


class Halting(Folder):
    """A folder that signals a request for a file, and waits for `go` before it yields the file."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked, self.go = threading.Event(), threading.Event()

    def blocks(self, entry: FileEntry) -> Iterator[bytes]:
        self.asked.set()
        self.go.wait()
        yield from super().blocks(entry)


def test_no_file_gets_its_name_while_room_is_counted(source: Folder, tmp_path: Path) -> None:
    """Counting looks at two folders, and would miss a file that is moved from one to the other meanwhile."""
    cache, halting = Cache(tmp_path / "cache", max_bytes=3000), Halting(source.root)
    fetcher = threading.Thread(target=use, args=(cache, halting, 0))
    fetcher.start()
    halting.asked.wait()
    with (cache.folder / "room").open("ab") as room:
        fcntl.flock(room, fcntl.LOCK_EX)
        halting.go.set()
        fetcher.join(timeout=0.3)
        assert fetcher.is_alive()
        assert held(cache, source) == []
    fetcher.join()
    assert held(cache, source) == [0]


@pytest.mark.kill
def test_many_processes_fetch_nothing_twice(store: Store, url: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    readers = [start(assert_every_row_is_read, url, tmp_path / "cache", log, seed, 2) for seed in range(4)]
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0
    assert Counter(log.read_text().split()) == {f"train/{SITE}/c/{w}/0": 1 for w in store.windows("train")}
    assert not files(tmp_path / "cache" / "fetching")


def test_threads_of_one_process_fetch_nothing_twice(source: Folder, tmp_path: Path) -> None:
    log = tmp_path / "log"
    cache = counted(tmp_path / "cache", log)
    threads = [threading.Thread(target=use, args=(cache, source, i % 3)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(log.read_text().split()) == ["0", "1", "2"]


def test_the_least_recently_used_file_is_removed_first(source: Folder, tmp_path: Path, hour: Any) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=3000)
    for number in (0, 1, 2, 0, 3, 4):
        use(cache, source, number)
    assert held(cache, source) == [0, 3, 4]


def test_an_open_file_is_kept_and_a_cache_full_of_open_files_is_an_error(
    source: Folder, tmp_path: Path, hour: Any
) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=3000)
    opened = [cache.open(entry_of(source, number), source) for number in (0, 1)]
    for number in (2, 3, 4):
        use(cache, source, number)
    assert held(cache, source) == [0, 1, 4]
    opened.append(cache.open(entry_of(source, 5), source))
    with pytest.raises(
        SpaceError, match=r"may hold 3000 bytes, and 3000 are in use: there is no room for 6 .* Raise GSAE_CACHE_BYTES"
    ):
        use(cache, source, 6)
    assert [os.read(fd, 1)[0] for _, fd in opened] == [0, 1, 5]
    for _, fd in opened:
        os.close(fd)
    use(cache, source, 6)
    assert held(cache, source) == [1, 5, 6]


@pytest.mark.kill
def test_a_fetcher_that_was_killed_leaves_nothing_behind(store: Store, url: str, tmp_path: Path) -> None:
    begun, cache = tmp_path / "begun", Cache(tmp_path / "cache")
    fetcher = start(fetch_for_ever, url, cache.folder, begun)
    while not begun.exists():
        assert fetcher.is_alive()
    fetcher.kill()
    fetcher.join()
    left = list((cache.folder / "fetching").iterdir())
    assert len(left) == 2  # the file and its lock
    heldout, other = (open_store(url, cache).site(SITE, split) for split in ("heldout", "train"))
    next(iter(other.in_order()))
    assert not any(path.exists() for path in left)
    assert sum(len(rows) for _, rows in heldout.in_order()) == store.site(SITE, "heldout").rows


def test_a_file_that_differs_from_the_manifest_is_not_published(tmp_path: Path) -> None:
    root = make_store(tmp_path / "store", contexts=60).path
    damaged = root / "train" / SITE / "c/0/0"
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    site = open_store(f"file://{root}", Cache(tmp_path / "cache")).site(SITE)
    with pytest.raises(CorruptError, match=rf"file://.*/train/{SITE}/c/0/0 has .* were written"):
        next(iter(site.in_order()))
    assert files(tmp_path / "cache") == {"room": b""}
    damaged.unlink()
    with pytest.raises(NotFoundError, match=rf"train/{SITE}/c/0/0 is not there"):
        next(iter(site.in_order()))


def test_a_cached_file_that_was_cut_short_is_fetched_again(source: Folder, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    path, fd = cache.open(entry_of(source, 7), source)
    os.close(fd)
    path.write_bytes(b"short")
    path, fd = cache.open(entry_of(source, 7), source)
    os.close(fd)
    assert path.read_bytes() == source.read("7")


@pytest.mark.parametrize(("shared", "umask", "modes"), [(False, 0o002, ("700", "600")), (True, 0o002, ("775", "664"))])
def test_a_cache_is_private_or_follows_the_umask(
    source: Folder, tmp_path: Path, shared: bool, umask: int, modes: tuple[str, str]
) -> None:
    cache, before = Cache(tmp_path / "cache", shared=shared), os.umask(umask)
    try:
        use(cache, source, 0)
    finally:
        os.umask(before)
    found = [cache.folder, *cache.folder.rglob("*")]
    assert {f"{p.stat().st_mode & 0o777:o}" for p in found if p.is_dir()} == {modes[0]}
    assert {f"{p.stat().st_mode & 0o777:o}" for p in found if p.is_file()} == {modes[1]}


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GSAE_CACHE", "GSAE_CACHE_BYTES", "GSAE_CACHE_SHARED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache.from_environment() == Cache(tmp_path / "gsae")
    monkeypatch.setenv("GSAE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("GSAE_CACHE_BYTES", "2e9")
    monkeypatch.setenv("GSAE_CACHE_SHARED", "1")
    assert Cache.from_environment() == Cache(tmp_path / "own", 2 * 10**9, shared=True)
    monkeypatch.setenv("GSAE_CACHE_BYTES", "much")
    with pytest.raises(UsageError, match="number of bytes"):
        Cache.from_environment()


@pytest.mark.kill
def test_a_forked_process_gets_an_error_and_does_not_hang(url: str, tmp_path: Path) -> None:
    finish(_assert_refused_after_a_fork, url, tmp_path / "cache")


def _assert_refused_after_a_fork(url: str, folder: Path) -> None:
    store = open_store(url, Cache(folder))
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        return
    try:
        store.tokens()
    except UsageError as error:
        os._exit("spawn" not in str(error))
    os._exit(2)
