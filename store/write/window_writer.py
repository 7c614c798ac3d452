"""Writing a store: the plan first, then windows in any order by anyone, the manifest last.

Each function may be killed anywhere and called again: what is published stays, what is not leaves no trace. A record
is made after the files of its window, and from them; the manifest is made from the records.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import IncompatibleError
from gsae.files import hash_file, publish_bytes, read_file
from gsae.store.codec.chunks import ArraySpec, unsigned
from gsae.store.format.arrays import context_arrays, metadata_files, window_arrays
from gsae.store.format.manifest import (
    MANIFEST,
    PLAN,
    ArrayEntry,
    FileEntry,
    Manifest,
    Record,
    all_windows,
    build,
    read_manifest,
    record_name,
)
from gsae.store.format.plan import SCHEMA_VERSION, Plan, canonical_json, parse
from gsae.store.format.row_order import Split
from gsae.store.places.pending_tokens import clear_tokens

from .shard_writer import NewShard, all_cores, write_shards


def write_plan(root: Path, plan: Plan) -> None:
    """Publish plan.json and all Zarr metadata, which stand for `tokens/` from now on.

    Raises IncompatibleError when another plan is there.
    """
    publish_bytes(root, PLAN, canonical_json(plan.model_dump(mode="json")))
    for name, data in metadata_files(plan).items():
        publish_bytes(root, name, data)
    clear_tokens(root)


def read_plan(root: Path) -> Plan | None:
    """Return the plan of the store that was begun at `root`; None where there is none."""
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
    """Write one window: a shard file for each site and the sources, then its record, which is returned.

    rows: for each site's name its rows (rows, d_in) in stored order, values or bit patterns.
    source: (rows,) context * context_size + position. threads: None for all cores; bytes do not depend on it.
    Raises SpaceError when the disk is full, IncompatibleError when the store was sealed without this window.
    """
    _check_open(root, split, window)
    values = [*(rows[site.name] for site in plan.sites), source]
    new = [
        NewShard(spec, window, _bits(spec, array), summed=array is not source)
        for spec, array in zip(window_arrays(plan, split), values, strict=True)
    ]
    *sites, sources = write_shards(root, new, threads or all_cores())
    moments = {
        site.name: p.moments.to_record() for site, p in zip(plan.sites, sites, strict=True) if p.moments is not None
    }
    entries = tuple(published.entry for published in (*sites, sources))
    record = Record(schema_version=SCHEMA_VERSION, split=split, window=window, arrays=entries, moments=moments)
    _check_open(root, split, window)
    publish_bytes(root, record_name(split, window), canonical_json(record.model_dump(mode="json")))
    return record


def _check_open(root: Path, split: Split, window: int) -> None:
    """A sealed store takes no more windows; one that others completed has this one."""
    if (root / MANIFEST).exists():
        manifest = read_manifest(read_file(root / MANIFEST), str(root / MANIFEST))
        if all((w.split, w.window) != (split, window) for w in manifest.windows):
            raise IncompatibleError(f"{root} was sealed without {split} window {window}; it never changes again.")


def _bits(spec: ArraySpec, rows: NDArray[Any]) -> NDArray[Any]:
    return rows.view(unsigned(spec.dtype))


def write_shard(
    root: Path, spec: ArraySpec, shard: int, rows: NDArray[Any], threads: int | None = None
) -> tuple[ArrayEntry, NDArray[Any]]:
    """Write one shard file and return its entry and the rows that are now in it, as `write_shards` does."""
    published = write_shards(root, [NewShard(spec, shard, rows)], threads or all_cores())[0]
    return published.entry, published.rows


def unfinished(root: Path, plan: Plan) -> list[tuple[Split, int]]:
    """List the windows that have no record yet, in the order of work."""
    return [(split, w) for split, w in all_windows(plan) if not (root / record_name(split, w)).exists()]


def write_manifest(root: Path, plan: Plan, windows: list[tuple[Split, int]] | None = None) -> Manifest:
    """Publish the manifest of a store with these windows (None: all of the plan's), and return it.

    All must have their record; NotFoundError names the first that has none.
    """
    c = plan.contexts
    shards = [
        spec.file(shard)
        for spec in context_arrays(c.contexts, c.context_size, c.documents)
        for shard in range(spec.shards)
    ]
    files = [_entry(root, name) for name in (PLAN, *metadata_files(plan), *shards)]
    records = []
    for split, window in all_windows(plan) if windows is None else windows:
        name = record_name(split, window)
        data = read_file(root / name, "Its window is not finished.")
        records.append((_entry(root, name), parse(Record, data, str(root / name))))
    manifest = build(plan, files, records)
    clear_tokens(root)
    publish_bytes(root, MANIFEST, canonical_json(manifest.model_dump(mode="json")))
    return manifest


def _entry(root: Path, name: str) -> FileEntry:
    return FileEntry(path=name, size=(root / name).stat().st_size, sha256=hash_file(root / name))
