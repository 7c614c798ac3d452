"""Copying a store, whole or in part, between folders and URLs: in parallel, checked, and resumable.

A whole copy moves bytes. plan.json goes first, so that what is begun says what it is; then the other files, each
checked against the manifest while it passes; then the records; the manifest last, so a copy is no store before it is
whole. What is there already with the right size and sum is not sent again. Another codec or a part of the store is
written by `rewrite.py`, window by window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gsae.files import sweep
from gsae.store.codec.chunks import Codec
from gsae.store.format.manifest import MANIFEST, PLAN, FileEntry, Manifest, every_file
from gsae.store.places.folder import STREAMS, Folder, Place, place, put_bytes, send
from gsae.store.read.store import find_manifest, open_store
from gsae.store.write.shard_writer import all_cores

from .rewrite import changed_plan, kept_windows, rewrite


@dataclass(frozen=True)
class Copied:
    """Progress of a copy: files and bytes of the source that are done, of how many; sent: bytes that were written."""

    files: int
    all_files: int
    bytes: int
    all_bytes: int
    sent: int


class _Tally:
    """Counts what is done and tells a listener."""

    def __init__(self, entries: list[FileEntry], listen: Callable[[Copied], None]) -> None:
        self._listen = listen
        self._now = Copied(0, len(entries), 0, sum(e.size for e in entries), 0)

    def __call__(self, entry: FileEntry, sent: int) -> None:
        now = self._now
        self._now = replace(now, files=now.files + 1, bytes=now.bytes + entry.size, sent=now.sent + sent)
        self._listen(self._now)


def copy(
    src: str | Path,
    dst: str | Path,
    *,
    codec: Codec | None = None,
    level: int | None = None,
    sites: Sequence[str] | None = None,
    windows: int | None = None,
    listen: Callable[[Copied], None] = lambda _: None,
    streams: int = STREAMS,
) -> str:
    """Copy the store at `src`, a folder or URL, to `dst`, and return the digest of what is there then.

    codec, level: encode the rows anew (same digest). sites, windows: take these sites, or the first train windows and
    all held-out ones (a digest of its own; the plan names the parent's). streams: files that move at a time. The same
    call goes on with what it began.

    Raises NotFoundError or IncompatibleError for a source that is no finished store, CorruptError for a source file
    that is not what its manifest says, IncompatibleError for a destination that holds something else, SpaceError,
    RemoteError, and UsageError for a part or codec that cannot be.
    """
    source, target = place(src), place(dst, create=True)
    manifest, data = find_manifest(source)
    plan = changed_plan(manifest, codec, level, sites, windows)
    if plan == manifest.plan:
        digest = _copy_whole(source, target, manifest, data, listen, streams)
    else:
        taken = kept_windows(manifest, plan)
        tally = _Tally([a.file for w in taken for a in w.arrays], listen)
        digest = rewrite(open_store(src), source, target, plan, taken, tally, min(streams, all_cores()))
    if isinstance(target, Folder):
        sweep(target.root)
    return digest


def _copy_whole(
    source: Place,
    target: Place,
    manifest: Manifest,
    data: bytes,
    listen: Callable[[Copied], None],
    streams: int,
) -> str:
    every = every_file(manifest)
    tally = _Tally(every, listen)
    records = {w.record.path for w in manifest.windows}
    for phase in (
        [e for e in every if e.path == PLAN],
        [e for e in every if e.path != PLAN and e.path not in records],
        [e for e in every if e.path in records],
    ):
        send(source, target, phase, tally, streams)
    put_bytes(target, MANIFEST, data)
    return manifest.digest
