"""Writing a store: the plan first, then windows in any order by any worker, the manifest last.

Each function may be killed at any moment and called again: published files stay, and temporary files are removed. A
record is written after the files of its window; the manifest is made from the records.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import IncompatibleError, NotFoundError
from gsae.files import hash_file, publish_bytes, read_file
from gsae.store.codec.chunks import ArraySpec, unsigned
from gsae.store.format.arrays import context_arrays, metadata_files, window_arrays
from gsae.store.format.json_files import SCHEMA_VERSION, parse, sha256, to_json
from gsae.store.format.manifest import (
    MANIFEST,
    PLAN,
    Confirmed,
    FileEntry,
    Manifest,
    Record,
    WindowTotals,
    all_windows,
    build,
    read_manifest,
    record_name,
)
from gsae.store.format.moments import Moments
from gsae.store.format.plan import Plan
from gsae.store.format.row_order import Split
from gsae.store.places.pending_tokens import clear_tokens

from .shard_writer import EncodedShards, ShardRows, all_cores, encode_shards, write_shards

CONFIRMED = "confirmed.json"


def write_plan(root: Path, plan: Plan) -> None:
    """Publish plan.json and all Zarr metadata, and remove `tokens/`, which the plan replaces.

    Raises IncompatibleError if the folder has another plan.
    """
    publish_bytes(root, PLAN, to_json(plan))
    for name, data in metadata_files(plan).items():
        publish_bytes(root, name, data)
    clear_tokens(root)


def write_confirmed(root: Path, tests: Mapping[str, tuple[str, ...]]) -> None:
    """Keep the tests that sites passed on the loaded model until `write_manifest` stores them.

    Raises IncompatibleError if other tests are kept already.
    """
    publish_bytes(root, CONFIRMED, to_json(Confirmed(schema_version=SCHEMA_VERSION, sites=dict(tests))))


def read_confirmed(root: Path) -> dict[str, tuple[str, ...]]:
    """Return the tests that `write_confirmed` kept, none if there are none. Raises CorruptError."""
    path = root / CONFIRMED
    try:
        return parse(Confirmed, read_file(path), str(path)).sites
    except NotFoundError:
        return {}


def read_plan(root: Path) -> Plan | None:
    """Return the plan of the store in `root`, finished or not; None if there is no plan. Raises CorruptError."""
    if not (root / PLAN).exists():
        return None
    return parse(Plan, read_file(root / PLAN), str(root / PLAN))


def write_window(
    root: Path,
    plan: Plan,
    split: Split,
    window: int,
    rows: Mapping[str, NDArray[Any]],
    source: NDArray[np.int64],
    threads: int | None = None,
) -> Record:
    """Write one window and return its record; arguments and errors are those of `encode_window` and `publish`."""
    return encode_window(root, plan, split, window, rows, source, threads).publish()


def encode_window(
    root: Path,
    plan: Plan,
    split: Split,
    window: int,
    rows: Mapping[str, NDArray[Any]],
    source: NDArray[np.int64],
    threads: int | None = None,
    approve: Callable[[Mapping[str, Moments]], None] = lambda moments: None,
) -> "EncodedWindow":
    """Encode one window into temporary files, a shard for each site and one for the sources.

    rows: for each site's name its rows (rows, d_in) in stored order, values or bit patterns. They may change once this
    has returned.
    source: (rows,) context * context_size + position. threads: None for all cores; bytes do not depend on it.
    approve: gets the moments of the window by site; if it raises, nothing is kept.
    Raises SpaceError if the disk is full, IncompatibleError if the store was sealed without this window.
    """
    _check_unsealed(root, split, window)
    values = [*(rows[site.name] for site in plan.sites), source]
    new = [
        ShardRows(spec, window, _bits(spec, array), has_moments=array is not source)
        for spec, array in zip(window_arrays(plan, split), values, strict=True)
    ]
    names = tuple(site.name for site in plan.sites)
    shards = encode_shards(
        root, new, threads or all_cores(), lambda found: approve(dict(zip(names, found, strict=True)))
    )
    return EncodedWindow(root, split, window, names, shards)


@dataclass(frozen=True)
class EncodedWindow:
    """A window in temporary files. sites: their names, in the order of the plan."""

    root: Path
    split: Split
    window: int
    sites: tuple[str, ...]
    shards: EncodedShards

    def publish(self, totals: WindowTotals | None = None) -> Record:
        """Publish the files of the window, then its record, which is returned. Call it once.

        totals: the window is added to them if it is the next one.
        Raises SpaceError if the disk is full, IncompatibleError if the store was sealed without this window.
        """
        *sites, sources = self.shards.publish()
        moments = {
            name: written.moments
            for name, written in zip(self.sites, sites, strict=True)
            if written.moments is not None
        }
        record = Record(
            schema_version=SCHEMA_VERSION,
            split=self.split,
            window=self.window,
            arrays=tuple(written.entry for written in (*sites, sources)),
            moments={name: each.to_record() for name, each in moments.items()},
        )
        _check_unsealed(self.root, self.split, self.window)
        name, data = record_name(self.split, self.window), to_json(record)
        publish_bytes(self.root, name, data)
        if totals is not None and totals.is_next(self.split, self.window):
            totals.add(FileEntry(path=name, size=len(data), sha256=sha256(data)), record, moments)
        return record


def _check_unsealed(root: Path, split: Split, window: int) -> None:
    """Raise IncompatibleError if the store has a manifest without this window."""
    if (root / MANIFEST).exists():
        manifest = read_manifest(read_file(root / MANIFEST), str(root / MANIFEST))
        if all((w.split, w.window) != (split, window) for w in manifest.windows):
            raise IncompatibleError(f"{root} was sealed without {split} window {window}; a sealed store never changes.")


def _bits(spec: ArraySpec, rows: NDArray[Any]) -> NDArray[Any]:
    return rows.view(unsigned(spec.dtype))


def write_shard(root: Path, spec: ArraySpec, shard: int, rows: NDArray[Any]) -> None:
    """Write one shard file, as `write_shards` does."""
    write_shards(root, [ShardRows(spec, shard, rows)], all_cores())


def unfinished(root: Path, plan: Plan) -> list[tuple[Split, int]]:
    """List the windows of the plan that have no record in `root` yet, in the order of work."""
    return [(split, w) for split, w in all_windows(plan) if not (root / record_name(split, w)).exists()]


def write_manifest(
    root: Path, plan: Plan, windows: list[tuple[Split, int]] | None = None, totals: WindowTotals | None = None
) -> Manifest:
    """Publish the manifest of a store with these windows (None: all of the plan's), and return it.

    totals: of the first of these windows; the records of the others are read.
    Raises NotFoundError for the first window without a record.
    """
    c = plan.contexts
    shards = [
        spec.file(shard)
        for spec in context_arrays(c.contexts, c.context_size, c.documents)
        for shard in range(spec.shards)
    ]
    files = [_entry(root, name) for name in (PLAN, *metadata_files(plan), *shards)]
    totals = totals or WindowTotals(plan)
    for split, window in (all_windows(plan) if windows is None else windows)[len(totals.windows) :]:
        name = record_name(split, window)
        data = read_file(root / name, "Its window is not finished.")
        totals.add(_entry(root, name), parse(Record, data, str(root / name)))
    confirmed = read_confirmed(root)
    if not confirmed and (root / MANIFEST).exists():  # another worker published it, and removed the tests after that
        return read_manifest(read_file(root / MANIFEST), str(root / MANIFEST))
    manifest = build(plan, files, totals, confirmed)
    clear_tokens(root)
    publish_bytes(root, MANIFEST, to_json(manifest))
    (root / CONFIRMED).unlink(missing_ok=True)
    return manifest


def _entry(root: Path, name: str) -> FileEntry:
    return FileEntry(path=name, size=(root / name).stat().st_size, sha256=hash_file(root / name))
