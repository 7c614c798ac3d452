"""Files moved between places: checked against their entry of the manifest while they pass, several at a time.

A file is read once: its sha256 is computed from the blocks on their way to the target.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from gsae.errors import CorruptError
from gsae.store.format.json_files import sha256
from gsae.store.format.manifest import FileEntry

from .place import Place

STREAMS = 8


def checked_blocks(place: Place, entry: FileEntry) -> Iterator[Any]:
    """Yield the blocks of a file; raise CorruptError at its end if its size or sha256 is not that of the entry."""
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
    """Copy the files that `target` does not hold yet, `streams` at a time; the first error stops all of them.

    done: called for each file with the bytes that were written: its size, or 0 if `target` held it already.
    """
    stopped = threading.Event()

    def blocks(entry: FileEntry) -> Iterator[Any]:
        for block in checked_blocks(source, entry):
            if stopped.is_set():
                raise InterruptedError(f"{entry.path} is not needed any more.")
            yield block

    def send_one(entry: FileEntry) -> int:
        if target.holds(entry):
            return 0
        target.put(entry, blocks(entry))
        return entry.size

    pool = ThreadPoolExecutor(streams, thread_name_prefix="gsae-copy")
    try:
        sending = {pool.submit(send_one, entry): entry for entry in entries}
        for future in as_completed(sending):
            done(sending[future], future.result())
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


def put_bytes(target: Place, name: str, data: bytes) -> FileEntry:
    """Write a small file unless `target` holds it already; return its entry. Raises as `Place.put`."""
    entry = FileEntry(path=name, size=len(data), sha256=sha256(data))
    if not target.holds(entry):
        target.put(entry, iter([data]))
    return entry
