"""A store made from another one: the same rows in another codec, or a part of them.

It is written window by window. Files that keep their encoding are copied; the others are decoded and encoded again, and
their rows compared with the sha256 of the raw rows. Moments come from the records of the source, since rows do not
change. For a URL, a window is encoded in a local temporary folder (TMPDIR), sent and removed, so it needs room for one
window. A window with a record in the target is finished, so the same call continues after an interruption.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gsae.errors import CorruptError, IncompatibleError, NotFoundError, UsageError
from gsae.settings import first_fault
from gsae.store.codec.chunks import ArraySpec
from gsae.store.codec.registry import row_codec
from gsae.store.format.arrays import metadata_files, window_arrays
from gsae.store.format.json_files import canonical_json, parse, to_json
from gsae.store.format.manifest import (
    MANIFEST,
    PLAN,
    ArrayEntry,
    FileEntry,
    Manifest,
    Record,
    WindowEntry,
    WindowTotals,
    build,
    listed_files,
    record_name,
)
from gsae.store.format.plan import Plan
from gsae.store.format.row_order import Split
from gsae.store.places.folder import Folder
from gsae.store.places.place import Place
from gsae.store.places.transfer import checked_blocks, put_bytes, send
from gsae.store.read.store import Store
from gsae.store.write.shard_writer import ShardRows, write_shards

DEFAULT_LEVEL = 1


def changed_plan(
    manifest: Manifest, codec: str | None, level: int | None, sites: Sequence[str] | None, windows: int | None
) -> Plan:
    """Return the plan of a copy: that of `manifest` if nothing is to be changed.

    The plan of a part names the digest of the source. Raises UsageError for a part or codec that is not possible.
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
        raise UsageError(f"A store cannot be like this: {first_fault(error)}.") from None


def _encoding(plan: Plan, codec: str | None, level: int | None) -> dict[str, Any]:
    codec = codec or plan.codec
    if level is None:
        level = plan.level if codec == plan.codec or row_codec(codec).levels is None else DEFAULT_LEVEL
    if fault := row_codec(codec).fault(level, plan.model.dtype):
        raise UsageError(f"{fault}.")
    return {} if (codec, level) == (plan.codec, plan.level) else {"codec": codec, "level": level}


def _fewer_sites(plan: Plan, sites: Sequence[str] | None) -> dict[str, Any]:
    have = [site.name for site in plan.sites]
    wanted = set(have if sites is None else sites)
    if not wanted or wanted - set(have):
        asked = ", ".join(sorted(wanted - set(have))) or "none"
        raise UsageError(f"Sites to copy: got {asked}; the store has {', '.join(have)}.")
    return {} if wanted == set(have) else {"sites": [s.model_dump(mode="json") for s in plan.sites if s.name in wanted]}


def _fewer_windows(manifest: Manifest, windows: int | None) -> dict[str, Any]:
    """Cut the train rows at the end of a window. A window is a random sample, so the first ones represent all."""
    train = [w.window for w in manifest.windows if w.split == "train"]
    if windows is None or windows == len(train):
        return {}
    if not 1 <= windows < len(train):
        raise UsageError(f"Windows to copy: got {windows}; the store has {len(train)} train windows.")
    rows = (train[windows - 1] + 1) * manifest.plan.window_rows
    return {"rows": rows, "requested_rows": rows}


def kept_windows(manifest: Manifest, plan: Plan) -> list[WindowEntry]:
    """Return the windows of `manifest` that are in `plan`, with their arrays that are in it."""
    kept = []
    for window in manifest.windows:
        specs = {spec.path: spec for spec in window_arrays(plan, window.split)}
        arrays = tuple(a for a in window.arrays if a.array in specs)
        if all(window.window < specs[a.array].shards for a in arrays):
            kept.append(window.model_copy(update={"arrays": arrays}))
    return kept


@dataclass(frozen=True)
class Rewriter:
    """Writes the store of `plan` to `target`, from `store` and its files in `source`.

    done: called for each file of `store` with the bytes written for it. threads: those that encode.
    """

    store: Store
    source: Place
    target: Place
    plan: Plan
    done: Callable[[FileEntry, int], None]
    threads: int

    def write(self, windows: list[WindowEntry]) -> str:
        """Write these windows and everything else, and return the digest. Raises as `copy`."""
        files = self._small_files()
        totals = WindowTotals(self.plan)
        with self._stage() as stage:
            for window in windows:
                totals.add(*self._window(window, stage))
        manifest = build(self.plan, files, totals, self.store.manifest.confirmed or {})
        put_bytes(self.target, MANIFEST, to_json(manifest))
        return manifest.digest

    def _small_files(self) -> list[FileEntry]:
        """Write the plan, then Zarr metadata, then copy tokens and documents; return their entries."""
        made = {PLAN: to_json(self.plan)} | metadata_files(self.plan)
        entries = [put_bytes(self.target, name, data) for name, data in made.items()]
        wanted = set(listed_files(self.plan)) - set(made)
        copied = [entry for entry in self.store.manifest.files if entry.path in wanted]
        send(self.source, self.target, copied)
        return entries + copied

    @contextmanager
    def _stage(self) -> Iterator[Path]:
        """Yield the folder in which shard files are written: the target itself, or a temporary one for a URL."""
        if isinstance(self.target, Folder):
            yield self.target.root
            return
        with tempfile.TemporaryDirectory(prefix="gsae-copy-") as folder:
            yield Path(folder)

    def _window(self, window: WindowEntry, stage: Path) -> tuple[FileEntry, Record]:
        """Write a window unless the target has its record; return the record and its entry."""
        name = record_name(window.split, window.window)
        try:
            data = self.target.read(name)
        except NotFoundError:
            data = to_json(self._write_window(window, stage))
        else:
            for entry in window.arrays:
                self.done(entry.file, 0)
        record = parse(Record, data, f"{self.target.name}/{name}")
        if _content(record.arrays) != _content(window.arrays):
            raise IncompatibleError(f"{self.target.name}/{name} records other rows than those of {self.store.name}.")
        return put_bytes(self.target, name, data), record

    def _write_window(self, window: WindowEntry, stage: Path) -> Record:
        """Write the files of a window and return its record."""
        data = b"".join(map(bytes, checked_blocks(self.source, window.record)))
        old = parse(Record, data, f"{self.source.name}/{window.record.path}")
        arrays = tuple(self._write_array(window, entry, stage) for entry in window.arrays)
        moments = {site.name: old.moments[site.name] for site in self.plan.sites}
        return old.model_copy(update={"arrays": arrays, "moments": moments})

    def _write_array(self, window: WindowEntry, entry: ArrayEntry, stage: Path) -> ArrayEntry:
        """Copy or encode one array of a window and return its new entry."""
        before, after = (_spec(plan, window.split, entry.array) for plan in (self.store.plan, self.plan))
        if (before.codec, before.level) == (after.codec, after.level):
            send(self.source, self.target, [entry.file], self.done)
            return entry
        with self.store.shard(before, window.window, "pread") as shard:
            rows = shard.read()
        shaped = rows.reshape(len(rows), *after.shape[1:])
        (written,) = write_shards(stage, [ShardRows(after, window.window, shaped)], self.threads)
        if written.entry.raw_sha256 != entry.raw_sha256:
            raise CorruptError(f"The rows of {self.store.name}/{entry.file.path} are not those of its record.")
        if not isinstance(self.target, Folder):
            send(Folder(stage), self.target, [written.entry.file])
            (stage / written.entry.file.path).unlink()
        self.done(entry.file, written.entry.file.size)
        return written.entry


def _spec(plan: Plan, split: Split, array: str) -> ArraySpec:
    return next(spec for spec in window_arrays(plan, split) if spec.path == array)


def _content(arrays: Sequence[ArrayEntry]) -> list[tuple[str, int, str]]:
    return [(a.array, a.rows, a.raw_sha256) for a in arrays]
