"""A store made from another one: the same rows in another codec, or a part of them.

Window by window: files whose encoding stays are copied as they are, the others are decoded and written anew, and both
are held against the sums of the raw rows; moments come from the source's records, since rows do not change. For a URL
a window is encoded in a local temp folder (TMPDIR), sent, and removed: one window of room is enough. A window whose
record is there is done, so the same call goes on with what it began.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gsae.errors import CorruptError, IncompatibleError, NotFoundError, UsageError
from gsae.store.codec.chunks import ArraySpec, Codec
from gsae.store.format.arrays import metadata_files, window_arrays
from gsae.store.format.manifest import (
    MANIFEST,
    PLAN,
    ArrayEntry,
    FileEntry,
    Manifest,
    Record,
    WindowEntry,
    build,
    listed_files,
    record_name,
)
from gsae.store.format.plan import Plan, canonical_json, first_fault, parse
from gsae.store.format.row_order import Split
from gsae.store.places.folder import Folder, Place, checked, put_bytes, send
from gsae.store.read.store import Store
from gsae.store.write.shard_writer import NewShard, write_shards

LEVELS = {"planes": (0, 1), "zstd": (1, 22)}
DEFAULT_LEVEL = 1


def changed_plan(
    manifest: Manifest, codec: Codec | None, level: int | None, sites: Sequence[str] | None, windows: int | None
) -> Plan:
    """Return the plan of a copy; that of `manifest` when nothing is to be changed.

    A part's plan names the digest that it was taken from. Raises UsageError for what cannot be.
    """
    plan = manifest.plan
    changes = _encoding(plan, codec, level)
    part = _fewer_sites(plan, sites) | _fewer_windows(manifest, windows)
    if part:
        changes |= part | {"parent": manifest.digest}
    if not changes:
        return plan
    try:
        return Plan.model_validate_json(canonical_json(plan.model_dump(mode="json") | changes))
    except ValidationError as error:
        raise UsageError(f"No store can be made like this: {first_fault(error)}.") from None


def _encoding(plan: Plan, codec: Codec | None, level: int | None) -> dict[str, Any]:
    codec = codec or plan.codec
    if level is None:
        level = plan.level if codec in (plan.codec, "none") else DEFAULT_LEVEL
    low, high = LEVELS.get(codec, (level, level))
    if not low <= level <= high:
        raise UsageError(f"Codec {codec} has levels {low} to {high}; got {level}.")
    return {} if (codec, level) == (plan.codec, plan.level) else {"codec": codec, "level": level}


def _fewer_sites(plan: Plan, sites: Sequence[str] | None) -> dict[str, Any]:
    have = [site.name for site in plan.sites]
    wanted = set(have if sites is None else sites)
    if not wanted or wanted - set(have):
        asked = ", ".join(sorted(wanted - set(have))) or "none"
        raise UsageError(f"Sites to copy: got {asked}; the store has {', '.join(have)}.")
    return {} if wanted == set(have) else {"sites": [s.model_dump(mode="json") for s in plan.sites if s.name in wanted]}


def _fewer_windows(manifest: Manifest, windows: int | None) -> dict[str, Any]:
    """Cut the train rows at a window's end: a window is a random sample, so the first ones are as good as any."""
    train = [w.window for w in manifest.windows if w.split == "train"]
    if windows is None or windows == len(train):
        return {}
    if not 1 <= windows < len(train):
        raise UsageError(f"Windows to copy: got {windows}; the store has {len(train)} train windows.")
    rows = (train[windows - 1] + 1) * manifest.plan.window_rows
    return {"rows": rows, "requested_rows": rows}


def kept_windows(manifest: Manifest, plan: Plan) -> list[WindowEntry]:
    """Return the windows of `manifest` that a copy with `plan` has, with the arrays that it has."""
    kept = []
    for window in manifest.windows:
        specs = {spec.path: spec for spec in window_arrays(plan, window.split)}
        arrays = tuple(a for a in window.arrays if a.array in specs)
        if all(window.window < specs[a.array].shards for a in arrays):
            kept.append(window.model_copy(update={"arrays": arrays}))
    return kept


def rewrite(
    store: Store,
    source: Place,
    target: Place,
    plan: Plan,
    windows: list[WindowEntry],
    done: Callable[[FileEntry, int], None],
    threads: int,
) -> str:
    """Write the store of `plan` from `windows` of `store`, and return its digest.

    source: where the files of `store` are. done: told of each of their files, with the bytes written for it.
    threads: those that encode. Raises as `copy`.
    """
    files = _small_files(store.manifest, source, target, plan)
    with _stage(target) as stage:
        writer = _Rewriter(store, source, target, plan, stage, done, threads)
        records = [writer.window(window) for window in windows]
    manifest = build(plan, files, records)
    put_bytes(target, MANIFEST, canonical_json(manifest.model_dump(mode="json")))
    return manifest.digest


def _small_files(manifest: Manifest, source: Place, target: Place, plan: Plan) -> list[FileEntry]:
    """Write the plan, then Zarr metadata, then tokens and documents as they are."""
    made = {PLAN: canonical_json(plan.model_dump(mode="json"))} | metadata_files(plan)
    entries = [put_bytes(target, name, data) for name, data in made.items()]
    wanted = set(listed_files(plan)) - set(made)
    copied = [entry for entry in manifest.files if entry.path in wanted]
    send(source, target, copied)
    return entries + copied


@contextmanager
def _stage(target: Place) -> Iterator[Path]:
    """Where shard files are written: the folder itself, or a temp folder before they are sent."""
    if isinstance(target, Folder):
        yield target.root
        return
    with tempfile.TemporaryDirectory(prefix="gsae-copy-") as folder:
        yield Path(folder)


class _Rewriter:
    """Writes windows one after the other; see `rewrite`."""

    def __init__(
        self,
        store: Store,
        source: Place,
        target: Place,
        plan: Plan,
        stage: Path,
        done: Callable[[FileEntry, int], None],
        threads: int,
    ) -> None:
        self.store, self.source, self.target, self.plan = store, source, target, plan
        self.stage, self.done, self.threads = stage, done, threads

    def window(self, window: WindowEntry) -> tuple[FileEntry, Record]:
        """Write a window unless its record is there, and return its record."""
        name = record_name(window.split, window.window)
        try:
            data = self.target.read(name)
        except NotFoundError:
            data = canonical_json(self._made(window).model_dump(mode="json"))
        else:
            for entry in window.arrays:
                self.done(entry.file, 0)
        record = parse(Record, data, f"{self.target.name}/{name}")
        if _content(record.arrays) != _content(window.arrays):
            raise IncompatibleError(f"{self.target.name}/{name} records other rows than those of {self.store.name}.")
        return put_bytes(self.target, name, data), record

    def _made(self, window: WindowEntry) -> Record:
        """Write the files of a window and return its record."""
        data = b"".join(map(bytes, checked(self.source, window.record)))
        old = parse(Record, data, f"{self.source.name}/{window.record.path}")
        arrays = tuple(self._array(window.split, window.window, entry) for entry in window.arrays)
        moments = {site.name: old.moments[site.name] for site in self.plan.sites}
        return old.model_copy(update={"arrays": arrays, "moments": moments})

    def _array(self, split: Split, window: int, entry: ArrayEntry) -> ArrayEntry:
        before, after = (_spec(plan, split, entry.array) for plan in (self.store.plan, self.plan))
        if (before.codec, before.level) == (after.codec, after.level):
            send(self.source, self.target, [entry.file], self.done)
            return entry
        with self.store.shard(before, window, "pread") as shard:
            rows = shard.read()
        shaped = rows.reshape(len(rows), *after.shape[1:])
        (made,) = write_shards(self.stage, [NewShard(after, window, shaped)], self.threads)
        if made.entry.raw_sha256 != entry.raw_sha256:
            raise CorruptError(f"The rows of {self.store.name}/{entry.file.path} are not those that its record sums.")
        if not isinstance(self.target, Folder):
            send(Folder(self.stage), self.target, [made.entry.file])
            (self.stage / made.entry.file.path).unlink()
        self.done(entry.file, made.entry.file.size)
        return made.entry


def _spec(plan: Plan, split: Split, array: str) -> ArraySpec:
    return next(spec for spec in window_arrays(plan, split) if spec.path == array)


def _content(arrays: Sequence[ArrayEntry]) -> list[tuple[str, int, str]]:
    return [(a.array, a.rows, a.raw_sha256) for a in arrays]
