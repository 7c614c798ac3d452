"""A local cache of the files of remote stores, keyed by their sha256: each file is fetched once, by one process.

All coordination is by file locks, so any number of processes can share a cache, and a killed one leaves nothing
behind. The process that fetches a file holds an exclusive lock, the readers of a file hold shared locks, and files
without a lock may be removed when room is needed, the least recently used first. A file gets its name in `shards`
after its sha256 was checked.

    FOLDER/shards/<sha256>     the files; the modification time is the time of the last use
    FOLDER/fetching/<sha256>   files that are being fetched, already at their full length to reserve the room;
                               the process that fetches one has locked <sha256>.lock
    FOLDER/room                locked while room is made, or while a file gets its name

Environment: GSAE_CACHE (~/.cache/gsae), GSAE_CACHE_BYTES (half of the free space), GSAE_CACHE_SHARED=1 for a folder
that other users share, with permissions from the umask; otherwise only its owner can use it (0700).
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gsae.errors import SpaceError, UsageError
from gsae.files import cache_folder, disk_errors, lock_file
from gsae.store.format.manifest import FileEntry

from .object_store import Remote
from .place import Place
from .shard import OpenFile
from .transfer import checked_blocks

LOCK = ".lock"


@dataclass(frozen=True)
class FetchedFile:
    """A file that was fetched from a remote store: its path there, and its size in bytes."""

    path: str
    bytes: int


def _ignore(_: FetchedFile) -> None:
    """Do nothing. A named function, because a cache must be picklable."""


@dataclass(frozen=True)
class Cache:
    """A cache folder. max_bytes: its limit, None for half of the free space. shared: other users share it.

    listen: called for every file that was fetched, on any thread.
    """

    folder: Path
    max_bytes: int | None = None
    shared: bool = False
    listen: Callable[[FetchedFile], None] = _ignore

    @classmethod
    def from_environment(cls) -> "Cache":
        """Return the cache that the environment names. Raises UsageError for an invalid size."""
        size = os.environ.get("GSAE_CACHE_BYTES", "")
        try:
            limit = int(float(size)) if size else None
        except (ValueError, OverflowError):
            raise UsageError(f"GSAE_CACHE_BYTES is a number of bytes, for instance 200e9; got {size!r}.") from None
        return cls(cache_folder(), limit, os.environ.get("GSAE_CACHE_SHARED", "") not in ("", "0"))

    def open(self, entry: FileEntry, source: Place) -> OpenFile:
        """Open a file of `source`, after fetching it if needed; it stays in the cache at least until it is closed.

        Raises SpaceError if files in use leave no room, CorruptError if the file is not that of the entry, and what
        `source` raises.
        """
        with disk_errors(self.folder):
            while (opened := self._open_cached(entry)) is None:
                self._fetch(entry, source)
            return opened

    def _open_cached(self, entry: FileEntry) -> OpenFile | None:
        """Open a file of the cache and lock it against removal; None if the cache does not have it."""
        path = self._files / entry.sha256
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        lock_file(descriptor, path, shared=True)
        found = os.fstat(descriptor)
        if found.st_nlink and found.st_size == entry.size:
            with suppress(PermissionError):  # the file of another user in a shared cache
                os.utime(path)
            return OpenFile(path, descriptor)
        if found.st_nlink:  # truncated by another program
            path.unlink()
        os.close(descriptor)
        return None

    def _fetch(self, entry: FileEntry, source: Place) -> None:
        """Fetch a file, or wait for the process that is fetching it."""
        with self._claimed(entry) as file:
            if file is None:
                return
            self._make_room(entry, file)
            for block in checked_blocks(source, entry):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            with self._locked(self._room):  # a process that counts the files must not miss one that is being renamed
                (self._fetching / entry.sha256).rename(self._files / entry.sha256)
        self.listen(FetchedFile(entry.path, entry.size))

    @contextmanager
    def _claimed(self, entry: FileEntry) -> Iterator[BinaryIO | None]:
        """Open the file to fetch, with an exclusive lock on its fetching; None if it was fetched meanwhile.

        The lock is on a separate file, because readers will hold locks on the fetched file as long as they read.
        """
        self._make_folders()
        while True:
            with self._locked(self._fetching / f"{entry.sha256}{LOCK}") as lock:
                if (self._files / entry.sha256).exists():
                    _unlink(Path(lock.name))
                    yield None
                    return
                if not os.fstat(lock.fileno()).st_nlink:
                    continue  # the holder before failed, or `_drop_abandoned` removed the lock before it was taken
                data = self._fetching / entry.sha256
                try:
                    with open(data, "w+b", opener=self._opener) as file:
                        yield file
                finally:
                    _unlink(data)
                    _unlink(Path(lock.name))
                return

    def _make_room(self, entry: FileEntry, file: BinaryIO) -> None:
        """Remove unused files, the least recently used first, until there is room; then reserve it for the file."""
        with self._locked(self._room):
            self._drop_abandoned()
            kept = sorted(_sizes(self._files), key=lambda f: f[1])
            used = sum(size for _, _, size in [*kept, *_sizes(self._fetching)])
            limit = self._limit(used)
            for path, _, size in kept:
                if used + entry.size <= limit:
                    break
                used -= size * _remove_unlocked(path)
            if used + entry.size > limit:
                raise SpaceError(
                    f"The cache {self.folder} may hold {limit} bytes, and {used} are in use: there is no room for "
                    f"{entry.path} with {entry.size}. Raise GSAE_CACHE_BYTES, or open fewer windows."
                )
            os.ftruncate(file.fileno(), entry.size)

    @contextmanager
    def _locked(self, path: Path) -> Iterator[BinaryIO]:
        with open(path, "ab", opener=self._opener) as file:
            lock_file(file.fileno(), path)
            yield file

    def _opener(self, path: str, flags: int) -> int:
        return os.open(path, flags, 0o666 if self.shared else 0o600)

    def _drop_abandoned(self) -> None:
        """Remove what killed processes left in `fetching`."""
        for lock in self._fetching.glob(f"*{LOCK}"):
            _remove_unlocked(lock, lock.with_suffix(""))

    def _limit(self, used: int) -> int:
        return (shutil.disk_usage(self.folder).free + used) // 2 if self.max_bytes is None else self.max_bytes

    def _make_folders(self) -> None:
        mode = 0o777 if self.shared else 0o700
        for folder in (self.folder, self._files, self._fetching):
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
        owner = self._files.stat().st_uid
        if not self.shared and owner != os.geteuid():
            raise UsageError(
                f"The cache {self.folder} belongs to user {owner}. Set GSAE_CACHE to another folder, or "
                "GSAE_CACHE_SHARED=1 if you trust this user."
            )

    @property
    def _files(self) -> Path:
        return self.folder / "shards"

    @property
    def _fetching(self) -> Path:
        return self.folder / "fetching"

    @property
    def _room(self) -> Path:
        return self.folder / "room"


class CachedRemote(Remote):
    """A remote store with files that are opened through a cache."""

    def __init__(self, url: str, cache: Cache) -> None:
        """Name a prefix; no request is sent yet."""
        super().__init__(url)
        self.cache = cache

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedRemote, (self.name, self.cache)

    def open(self, entry: FileEntry) -> OpenFile:
        """As `Readable.open`. Raises as `Cache.open`."""
        return self.cache.open(entry, self)


def _sizes(folder: Path) -> Iterator[tuple[Path, float, int]]:
    """Yield the path, the time of the last use and the bytes of each file in a folder."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            found = path.stat()
            yield path, found.st_mtime, found.st_size


def _remove_unlocked(path: Path, *with_it: Path) -> bool:
    """Remove a file, and others together with it, unless a process has it locked; return whether it is removed."""
    try:
        descriptor = _open_to_lock(path)
    except FileNotFoundError:
        return True
    except PermissionError:  # the file of another user in a shared cache
        return False
    try:
        if not lock_file(descriptor, path, wait=False):
            return False
        for each in (*with_it, path):
            _unlink(each)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _open_to_lock(path: Path) -> int:
    """Open a file so that it can be locked exclusively: NFS requires write permission for that."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
