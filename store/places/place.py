"""What a place must be able to do: a local folder or a URL of an object store that holds the files of stores.

Files that are written appear whole or not at all, and never replace other content. Paths inside a place are relative
and use slashes on every system.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from gsae.store.format.manifest import FileEntry

from .folder import Folder
from .object_store import Remote, is_url
from .shard import OpenFile


class Place(Protocol):
    """A folder or a URL; `name` is its path or URL, as it stands in messages."""

    name: str

    def read(self, name: str) -> bytes:
        """Return a small file whole. Raises NotFoundError."""

    def blocks(self, entry: FileEntry) -> Iterator[Any]:
        """Yield the bytes of a file in blocks of some MiB; the size and sum are not checked. Raises NotFoundError."""

    def put(self, entry: FileEntry, blocks: Iterator[Any]) -> None:
        """Write a file from its blocks. If `blocks` raises, no file appears. Raises IncompatibleError, SpaceError."""

    def holds(self, entry: FileEntry) -> bool:
        """Whether the file exists with this size and sha256. Raises IncompatibleError for other content."""

    def children(self, folder: str) -> tuple[list[str], dict[str, int]]:
        """Return the paths of the folders directly in `folder`, and the sizes in bytes of the files there by path."""


class Readable(Place, Protocol):
    """A place with files that can be opened as local files."""

    def open(self, entry: FileEntry) -> OpenFile:
        """Open a file for reading. Raises NotFoundError."""


def place_at(path: str | Path, create: bool = False) -> Place:
    """Return the place that a folder or URL names; create: the folder of a file:// URL is made if it is missing."""
    return Remote(str(path), create) if is_url(path) else Folder(Path(path))
