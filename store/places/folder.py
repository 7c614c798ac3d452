"""A local folder as a place for the files of a store: files are published durably and never replaced.

Publishing costs a temporary file and some fsyncs for each file; what `holds` reports true it has read to the end.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from gsae.errors import IncompatibleError, NotFoundError
from gsae.files import READ_BYTES, disk_errors, hash_file, publish, read_file, sync_up_to, temp_file
from gsae.store.format.manifest import FileEntry

from .shard import OpenFile, open_file


class Folder:
    """A local folder; its methods are those of `place.Readable`."""

    def __init__(self, root: Path) -> None:
        """Name a folder; it is created with the first file in it."""
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

    def open(self, entry: FileEntry) -> OpenFile:
        """As `Readable.open`."""
        return open_file(self.root / entry.path)

    def put(self, entry: FileEntry, blocks: Iterator[Any]) -> None:
        """As `Place.put`; the file is durable when this returns."""
        with disk_errors(self.root), temp_file(self.root) as file:
            for block in blocks:
                file.write(block)
            if not publish(self.root, entry.path, file, entry.sha256):
                raise self._differs(entry)

    def holds(self, entry: FileEntry) -> bool:
        """As `Place.holds`. Reads the file, and makes its name durable in case its writer was killed before that."""
        path = self.root / entry.path
        if not path.exists():
            return False
        if path.stat().st_size != entry.size or hash_file(path) != entry.sha256:
            raise self._differs(entry)
        sync_up_to(self.root, path.parent)
        return True

    def children(self, folder: str) -> tuple[list[str], dict[str, int]]:
        """As `Place.children`, without hidden folders; a folder that cannot be read counts as empty."""
        folders, files = [], {}
        try:
            found = sorted(os.scandir(self.root / folder), key=lambda e: e.name)
        except OSError:
            return [], {}
        for item in found:
            path = f"{folder}/{item.name}" if folder else item.name
            with suppress(OSError):  # removed meanwhile, or a link to itself
                if item.is_dir(follow_symlinks=True):
                    folders += [path] * (not item.name.startswith("."))
                elif item.is_file():
                    files[path] = item.stat().st_size
        return folders, files

    def _differs(self, entry: FileEntry) -> IncompatibleError:
        return IncompatibleError(
            f"{self.root / entry.path} already exists with different content; left unchanged. Use another folder."
        )
