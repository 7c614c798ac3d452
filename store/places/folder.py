"""Where the files of a store are: a local folder or a URL, under the same few verbs.

What is written appears whole or not at all and never replaces anything; what is read is checked against its entry of
the manifest while it passes, so that a copy costs one pass.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from gsae.errors import CorruptError, IncompatibleError, NotFoundError
from gsae.files import READ_BYTES, disk_errors, hash_file, publish, read_file, sync_up_to, temp_file
from gsae.store.format.manifest import FileEntry
from gsae.store.format.plan import sha256

from .object_store import Remote, is_url
from .shard import Opened, open_file

STREAMS = 8


class Place(Protocol):
    """A folder or a URL; `name` is what messages call it, paths in it are relative and use slashes."""

    name: str

    def read(self, name: str) -> bytes:
        """Return a small file whole; raises NotFoundError."""

    def blocks(self, entry: FileEntry) -> Iterator[Any]:
        """Yield the bytes of a file, some MiB at a time, unchecked; raises NotFoundError."""

    def put(self, entry: FileEntry, blocks: Iterator[Any]) -> None:
        """Write a file from its blocks, whole or, when `blocks` raises, not at all."""

    def holds(self, entry: FileEntry) -> bool:
        """Whether the file is there as the entry says; raises IncompatibleError when it is there otherwise."""

    def children(self, folder: str) -> tuple[list[str], dict[str, int]]:
        """Return the folders directly in `folder` and the bytes of each file there, all by their paths."""


class Readable(Place, Protocol):
    """A place whose files can be opened as local ones."""

    def open(self, entry: FileEntry) -> Opened:
        """Return the path and a descriptor of a file; raises NotFoundError."""


class Folder:
    """A local folder."""

    def __init__(self, root: Path) -> None:
        """Name a folder; it is made with the first file in it."""
        self.root = root
        self.name = str(root)

    def read(self, name: str) -> bytes:
        """As `Place.read`."""
        return read_file(self.root / name)

    def blocks(self, entry: FileEntry) -> Iterator[bytes]:
        """As `Place.blocks`."""
        try:
            with (self.root / entry.path).open("rb") as file:
                while block := file.read(READ_BYTES):
                    yield block
        except FileNotFoundError:
            raise NotFoundError(f"{self.root / entry.path} is missing.") from None

    def open(self, entry: FileEntry) -> Opened:
        """As `Readable.open`."""
        path = self.root / entry.path
        return path, open_file(path)

    def put(self, entry: FileEntry, blocks: Iterator[Any]) -> None:
        """As `Place.put`; durable when it returns."""
        with disk_errors(self.root), temp_file(self.root) as file:
            for block in blocks:
                file.write(block)
            if not publish(self.root, entry.path, file, entry.sha256):
                raise self._other(entry)

    def holds(self, entry: FileEntry) -> bool:
        """As `Place.holds`; reads the file, and makes its name durable: whoever wrote it may not have come to that."""
        path = self.root / entry.path
        if not path.exists():
            return False
        if path.stat().st_size != entry.size or hash_file(path) != entry.sha256:
            raise self._other(entry)
        sync_up_to(self.root, path.parent)
        return True

    def children(self, folder: str) -> tuple[list[str], dict[str, int]]:
        """As `Place.children`; hidden folders are left out, and what cannot be read is empty."""
        folders, files = [], {}
        try:
            found = sorted(os.scandir(self.root / folder), key=lambda e: e.name)
        except OSError:
            return [], {}
        for item in found:
            path = f"{folder}/{item.name}" if folder else item.name
            with suppress(OSError):  # gone meanwhile, or a link to itself
                if item.is_dir(follow_symlinks=True):
                    folders += [path] * (not item.name.startswith("."))
                elif item.is_file():
                    files[path] = item.stat().st_size
        return folders, files

    def _other(self, entry: FileEntry) -> IncompatibleError:
        return IncompatibleError(
            f"{self.root / entry.path} is there with other content; it was kept. Use another folder."
        )


def place(path: str | Path, create: bool = False) -> Place:
    """Return the place that a folder or URL names; create: it will be written to."""
    return Remote(str(path), create) if is_url(path) else Folder(Path(path))


def checked(place: Place, entry: FileEntry) -> Iterator[Any]:
    """Yield the blocks of a file and raise CorruptError at its end when it has not the entry's size and sha256."""
    digest, size = hashlib.sha256(), 0
    for block in place.blocks(entry):
        digest.update(block)
        size += len(block)
        yield block
    if (size, digest.hexdigest()) != (entry.size, entry.sha256):
        raise CorruptError(
            f"{place.name}/{entry.path} has {size} bytes with sha256 {digest.hexdigest()[:12]}…; {entry.size} with "
            f"{entry.sha256[:12]}… were written."
        )


def send(
    source: Place,
    target: Place,
    entries: Sequence[FileEntry],
    done: Callable[[FileEntry, int], None] = lambda *_: None,
    streams: int = STREAMS,
) -> None:
    """Copy files, `streams` at a time, that `target` does not hold yet; the first error ends all of it.

    done: called for each file with the bytes that were written.
    """
    ended = threading.Event()

    def blocks(entry: FileEntry) -> Iterator[Any]:
        for block in checked(source, entry):
            if ended.is_set():
                raise InterruptedError(f"{entry.path} is not wanted any more.")
            yield block

    def one(entry: FileEntry) -> int:
        if target.holds(entry):
            return 0
        target.put(entry, blocks(entry))
        return entry.size

    pool = ThreadPoolExecutor(streams, thread_name_prefix="gsae-copy")
    try:
        flying = {pool.submit(one, entry): entry for entry in entries}
        for future in as_completed(flying):
            done(flying[future], future.result())
    finally:
        ended.set()
        pool.shutdown(wait=True, cancel_futures=True)


def put_bytes(target: Place, name: str, data: bytes) -> FileEntry:
    """Write a small file unless it is there already; return its entry."""
    entry = FileEntry(path=name, size=len(data), sha256=sha256(data))
    if not target.holds(entry):
        target.put(entry, iter([data]))
    return entry
