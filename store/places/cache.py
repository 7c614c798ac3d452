"""A local cache of the files of remote stores, keyed by their sha256: each is fetched once, whole, whoever asks.

Everything goes by file locks, so any number of processes share a cache and a killed one leaves nothing behind: who
fetches a file has a lock alone, a file in use is locked in common by its readers, and what is not locked may go when
room is needed, the least recently used first. A file gets its name when its sha256 is right.

    FOLDER/shards/<sha256>     the files; the time of change is that of the last use
    FOLDER/fetching/<sha256>   files being fetched, already of their full length, so that their room is taken;
                               each with <sha256>.lock, which its fetcher has locked
    FOLDER/room                locked while room is made, or a file gets its name

Environment: GSAE_CACHE (~/.cache/gsae), GSAE_CACHE_BYTES (half of what is free), GSAE_CACHE_SHARED=1 for a folder that
others use too, with permissions from the umask; otherwise it is its owner's alone (0700).
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gsae.errors import SpaceError, UsageError
from gsae.files import disk_errors
from gsae.store.format.manifest import FileEntry

from .folder import Place, checked
from .object_store import Remote
from .shard import Opened

LOCK = ".lock"


@dataclass(frozen=True)
class Fetched:
    """A file that was fetched from a remote store: its path there and its bytes."""

    path: str
    bytes: int


def _unheard(_: Fetched) -> None:
    """Tell nobody: a function with a name, so that a cache can be sent to another process."""


@dataclass(frozen=True)
class Cache:
    """A cache folder. max_bytes: what it may hold, None for half of what is free. shared: others use it too.

    listen: told of every file that is fetched, on whatever thread.
    """

    folder: Path
    max_bytes: int | None = None
    shared: bool = False
    listen: Callable[[Fetched], None] = _unheard

    @classmethod
    def from_environment(cls) -> "Cache":
        """Return the cache that the environment names; raises UsageError for a size that is none."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        size = os.environ.get("GSAE_CACHE_BYTES", "")
        try:
            limit = int(float(size)) if size else None
        except (ValueError, OverflowError):
            raise UsageError(f"GSAE_CACHE_BYTES is a number of bytes, for instance 200e9; got {size!r}.") from None
        folder = Path(os.environ.get("GSAE_CACHE") or Path(base) / "gsae")
        return cls(folder, limit, os.environ.get("GSAE_CACHE_SHARED", "") not in ("", "0"))

    def open(self, entry: FileEntry, source: Place) -> Opened:
        """Return a file of `source`, fetched if need be; it stays in the cache at least until it is closed.

        Raises SpaceError when the files in use leave no room, CorruptError when it is not what the entry says, and
        what `source` raises.
        """
        with disk_errors(self.folder):
            while (opened := self._in_use(entry)) is None:
                self._fetch(entry, source)
            return opened

    def _in_use(self, entry: FileEntry) -> Opened | None:
        """Open a file that is here and lock it against removal."""
        path = self._files / entry.sha256
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        found = os.fstat(fd)
        if found.st_nlink and found.st_size == entry.size:
            with suppress(PermissionError):  # another's file in a shared cache
                os.utime(path)
            return path, fd
        if found.st_nlink:  # cut short by somebody
            path.unlink()
        os.close(fd)
        return None

    def _fetch(self, entry: FileEntry, source: Place) -> None:
        """Fetch a file, or wait for whoever is fetching it."""
        with self._alone(entry) as file:
            if file is None:
                return
            self._make_room(entry, file)
            for block in checked(source, entry):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            with self._locked(self._room):  # whoever counts what is here must not miss a file on its way
                (self._fetching / entry.sha256).rename(self._files / entry.sha256)
        self.listen(Fetched(entry.path, entry.size))

    @contextmanager
    def _alone(self, entry: FileEntry) -> Iterator[BinaryIO | None]:
        """Open the file to be fetched, with a lock on its fetching; None when it has been fetched meanwhile.

        The lock is a file of its own: the fetched file's will be held by its readers for as long as they read.
        """
        self._make_folders()
        while True:
            with self._locked(self._fetching / f"{entry.sha256}{LOCK}") as lock:
                if (self._files / entry.sha256).exists():
                    _unlink(Path(lock.name))
                    yield None
                    return
                if not os.fstat(lock.fileno()).st_nlink:
                    continue  # the one who had it failed, or was taken for dead
                data = self._fetching / entry.sha256
                try:
                    with open(data, "w+b", opener=self._opener) as file:
                        yield file
                finally:
                    _unlink(data)
                    _unlink(Path(lock.name))
                return

    def _make_room(self, entry: FileEntry, file: BinaryIO) -> None:
        """Remove unused files, the least recently used first, until the file has room; then take that room."""
        with self._locked(self._room):
            self._drop_abandoned()
            kept = sorted(_sizes(self._files), key=lambda f: f[1])
            held = sum(size for _, _, size in [*kept, *_sizes(self._fetching)])
            limit = self._limit(held)
            for path, _, size in kept:
                if held + entry.size <= limit:
                    break
                held -= size * _removed(path)
            if held + entry.size > limit:
                raise SpaceError(
                    f"The cache {self.folder} may hold {limit} bytes, and {held} are in use: {entry.path} with "
                    f"{entry.size} finds no room. Raise GSAE_CACHE_BYTES, or keep fewer windows open."
                )
            os.ftruncate(file.fileno(), entry.size)

    @contextmanager
    def _locked(self, path: Path) -> Iterator[BinaryIO]:
        with open(path, "ab", opener=self._opener) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _opener(self, path: str, flags: int) -> int:
        return os.open(path, flags, 0o666 if self.shared else 0o600)

    def _drop_abandoned(self) -> None:
        for lock in self._fetching.glob(f"*{LOCK}"):
            _removed(lock, lock.with_suffix(""))

    def _limit(self, held: int) -> int:
        return (shutil.disk_usage(self.folder).free + held) // 2 if self.max_bytes is None else self.max_bytes

    def _make_folders(self) -> None:
        mode = 0o777 if self.shared else 0o700
        for folder in (self.folder, self._files, self._fetching):
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
        owner = self._files.stat().st_uid
        if not self.shared and owner != os.geteuid():
            raise UsageError(
                f"The cache {self.folder} belongs to user {owner}. Set GSAE_CACHE to a folder of your own, or "
                "GSAE_CACHE_SHARED=1 if the two of you trust each other."
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


class Cached(Remote):
    """A remote store whose files are opened in a cache."""

    def __init__(self, url: str, cache: Cache) -> None:
        """Name a prefix; nothing is asked of the server yet."""
        super().__init__(url)
        self.cache = cache

    def __reduce__(self) -> tuple[Any, ...]:
        return Cached, (self.name, self.cache)

    def open(self, entry: FileEntry) -> Opened:
        """As `Readable.open`; raises as `Cache.open`."""
        return self.cache.open(entry, self)


def _sizes(folder: Path) -> Iterator[tuple[Path, float, int]]:
    """Yield path, last use and bytes of each file in a folder."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            found = path.stat()
            yield path, found.st_mtime, found.st_size


def _removed(path: Path, *with_it: Path) -> bool:
    """Remove a file, and others with it, unless somebody has it locked; say whether it is gone."""
    try:
        fd = _opened_to_lock(path)
    except FileNotFoundError:
        return True
    except PermissionError:  # another's, in a shared cache
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for each in (*with_it, path):
            _unlink(each)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _opened_to_lock(path: Path) -> int:
    """Open a file so that it can be locked alone: over NFS that takes the right to write."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
