"""Writing a store: the plan first, then windows in any order by anyone, the manifest last.

Chunks are encoded on all cores, appended and hashed as they come, with a few chunks in flight and the index at the
end; every chunk is written whatever its values. Each function may be killed anywhere and called again: what is
published stays, what is not leaves no trace.
"""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .arrays import SOURCE, context_arrays, metadata_files, window_arrays
from .chunks import NUMPY_DTYPES, ArraySpec, encode_index
from .manifest import (
    MANIFEST,
    PLAN,
    ArrayEntry,
    FileEntry,
    Manifest,
    Record,
    all_windows,
    build,
    record_name,
)
from .mapped import UNSIGNED, Shard
from .moments import Moments
from .order import Split
from .plan import SCHEMA_VERSION, Plan, canonical_json, parse
from .publish import disk_errors, hash_file, publish, publish_bytes, raw_sha256, read_file, temp_file


def write_plan(root: Path, plan: Plan) -> None:
    """Publish plan.json and all Zarr metadata; raises IncompatibleError when another plan is there."""
    publish_bytes(root, PLAN, canonical_json(plan.model_dump(mode="json")))
    for name, data in metadata_files(plan).items():
        publish_bytes(root, name, data)


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
) -> None:
    """Write one window: a shard file for each site and the sources, then its record.

    rows: for each site's name its rows (rows, d_in) in stored order, values or bit patterns.
    source: (rows,) context * context_size + position.
    """
    entries: list[ArrayEntry] = []
    moments = {}
    values = [*(rows[site.name] for site in plan.sites), source]
    names = [*(site.name for site in plan.sites), SOURCE]
    for spec, name, array in zip(window_arrays(plan, split), names, values, strict=True):
        bits = array.view(UNSIGNED[NUMPY_DTYPES[spec.dtype].itemsize])
        entry, kept = write_shard(root, spec, window, bits)
        entries.append(entry)
        if name != SOURCE:
            moments[name] = Moments.of(kept, spec.dtype).to_record()
    record = Record(schema_version=SCHEMA_VERSION, split=split, window=window, arrays=tuple(entries), moments=moments)
    publish_bytes(root, record_name(split, window), canonical_json(record.model_dump(mode="json")))


def write_shard(root: Path, spec: ArraySpec, shard: int, rows: NDArray[Any]) -> tuple[ArrayEntry, NDArray[Any]]:
    """Write one shard file and return its entry and the rows that are now in it.

    Where a file of that name holds other bytes (two workers on hardware that differs), it is kept, and the entry and
    rows are those of that file.
    """
    name = spec.file(shard)
    with disk_errors(root), temp_file(root) as file:
        sha256, size = _append_chunks(file, spec, rows)
        if not publish(root, name, file, sha256):
            with Shard(root, spec, shard) as published:
                rows = published.read().view(rows.dtype).reshape(rows.shape)
            sha256, size = hash_file(root / name), (root / name).stat().st_size
    entry = FileEntry(path=name, size=size, sha256=sha256)
    return ArrayEntry(array=spec.path, rows=len(rows), raw_sha256=raw_sha256([rows]), file=entry), rows


def _append_chunks(file: BinaryIO, spec: ArraySpec, rows: NDArray[Any]) -> tuple[str, int]:
    """Write the chunks of `rows` and their index to `file`; return the file's sha256 and size."""
    digest = hashlib.sha256()
    entries: list[tuple[int, int]] = []
    offset = 0
    for chunk in _encoded(spec, rows):
        file.write(chunk)
        digest.update(chunk)
        entries.append((offset, len(chunk)))
        offset += len(chunk)
    index = encode_index(entries, spec.chunks_of_shard)
    file.write(index)
    digest.update(index)
    return digest.hexdigest(), offset + len(index)


def _encoded(spec: ArraySpec, rows: NDArray[Any]) -> Iterator[bytes]:
    """Encode chunks on all cores, in order, two a core in flight."""

    def encode(first: int) -> bytes:
        return spec.encode(spec.fill(rows[first : first + spec.chunk_rows]))

    workers = os.cpu_count() or 1
    firsts = iter(range(0, len(rows), spec.chunk_rows))
    with ThreadPoolExecutor(workers) as pool:
        flying: deque[Future[bytes]] = deque(
            pool.submit(encode, first) for first in itertools.islice(firsts, 2 * workers)
        )
        while flying:
            yield flying.popleft().result()
            flying.extend(pool.submit(encode, first) for first in itertools.islice(firsts, 1))


def unfinished(root: Path, plan: Plan) -> list[tuple[Split, int]]:
    """List the windows that have no record yet, in the order of work."""
    return [(split, w) for split, w in all_windows(plan) if not (root / record_name(split, w)).exists()]


def write_manifest(root: Path, plan: Plan) -> Manifest:
    """Publish the manifest of a store whose windows are all recorded, and return it."""
    c = plan.contexts
    shards = [
        spec.file(shard)
        for spec in context_arrays(c.contexts, c.context_size, c.documents)
        for shard in range(spec.shards)
    ]
    files = [_entry(root, name) for name in (PLAN, *metadata_files(plan), *shards)]
    records = []
    for split, window in all_windows(plan):
        name = record_name(split, window)
        records.append((_entry(root, name), parse(Record, read_file(root / name), str(root / name))))
    manifest = build(plan, files, records)
    publish_bytes(root, MANIFEST, canonical_json(manifest.model_dump(mode="json")))
    return manifest


def _entry(root: Path, name: str) -> FileEntry:
    return FileEntry(path=name, size=(root / name).stat().st_size, sha256=hash_file(root / name))
