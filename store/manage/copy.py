"""Copying a store, whole or in part, between folders and URLs: in parallel, checked, and resumable.

A whole copy moves files as they are. plan.json goes first, so that an unfinished copy can be recognised; then the other
files, each checked against the manifest while it passes; then the records; the manifest last, so that a copy is not a
store before it is complete. A file that the target has already, with the same size and sha256, is not sent again.
Another codec or a part of the store is written by `rewrite.py`, window by window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gsae.files import sweep
from gsae.store.format.manifest import MANIFEST, PLAN, FileEntry, Manifest, every_file
from gsae.store.places.folder import Folder
from gsae.store.places.place import Place, place_at
from gsae.store.places.transfer import STREAMS, put_bytes, send
from gsae.store.read.store import find_manifest, open_store
from gsae.store.write.shard_writer import all_cores

from .rewrite import Rewriter, changed_plan, kept_windows


@dataclass(frozen=True)
class CopyProgress:
    """Files and bytes of the source that are done, and of how many. sent: bytes that were written."""

    files: int
    all_files: int
    bytes: int
    all_bytes: int
    sent: int


class _Counter:
    """Counts files that are done and calls a listener with the progress."""

    def __init__(self, entries: list[FileEntry], listen: Callable[[CopyProgress], None]) -> None:
        self._listen = listen
        self._now = CopyProgress(0, len(entries), 0, sum(e.size for e in entries), 0)

    def __call__(self, entry: FileEntry, sent: int) -> None:
        now = self._now
        self._now = replace(now, files=now.files + 1, bytes=now.bytes + entry.size, sent=now.sent + sent)
        self._listen(self._now)


def copy(
    src: str | Path,
    dst: str | Path,
    *,
    codec: str | None = None,
    level: int | None = None,
    sites: Sequence[str] | None = None,
    windows: int | None = None,
    listen: Callable[[CopyProgress], None] = lambda _: None,
    streams: int = STREAMS,
) -> str:
    """Copy the store at `src`, a folder or URL, to `dst`, and return the digest of the copy.

    Parameters
    ----------
    codec, level : optional
        Encode the rows again. The digest stays the same.
    sites, windows : optional
        Take these sites, or the first train windows and all held-out ones. The copy has another digest, and its plan
        names the digest of the source as its parent.
    listen : callable
        Called with the progress after each file.
    streams : int
        Files that are moved at a time.

    Raises
    ------
    NotFoundError, IncompatibleError
        If the source is not a complete store.
    CorruptError
        If a file of the source is not that of its manifest.
    IncompatibleError
        If a file of the destination exists with different content.
    UsageError
        For a part or codec that is not possible.
    SpaceError, RemoteError
        If the destination is full, or a server does not answer. The same call continues the copy.
    """
    source, target = place_at(src), place_at(dst, create=True)
    manifest, data = find_manifest(source)
    plan = changed_plan(manifest, codec, level, sites, windows)
    if plan == manifest.plan:
        digest = _copy_whole(source, target, manifest, data, listen, streams)
    else:
        taken = kept_windows(manifest, plan)
        done = _Counter([a.file for w in taken for a in w.arrays], listen)
        rewriter = Rewriter(open_store(src), source, target, plan, done, min(streams, all_cores()))
        digest = rewriter.write(taken)
    if isinstance(target, Folder):
        sweep(target.root)
    return digest


def _copy_whole(
    source: Place,
    target: Place,
    manifest: Manifest,
    data: bytes,
    listen: Callable[[CopyProgress], None],
    streams: int,
) -> str:
    """Copy all files of `manifest`, with the bytes `data`, in their order; return the digest."""
    every = every_file(manifest)
    done = _Counter(every, listen)
    records = {w.record.path for w in manifest.windows}
    for phase in (
        [e for e in every if e.path == PLAN],
        [e for e in every if e.path != PLAN and e.path not in records],
        [e for e in every if e.path in records],
    ):
        send(source, target, phase, done, streams)
    put_bytes(target, MANIFEST, data)
    return manifest.digest
