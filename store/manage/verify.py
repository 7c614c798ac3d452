"""Whether a store holds what its manifest says; every fault is listed with its file and chunk.

The quick check compares names, sizes, metadata, records and indexes, and reads no activations. The deep check reads
every byte: file sums, every chunk decoded, raw rows against their sums, moments computed again, and the source of each
row against the order that plan and tokens give. Files are checked in parallel, with one chunk a thread in memory and
two bytes a token. Each file is read twice, for its sum and for its chunks, with pread, so that a file that is truncated
meanwhile is a fault and not a signal. If tokens are damaged, the order is not checked.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError, GsaeError
from gsae.store.codec.chunks import ArraySpec, unsigned
from gsae.store.format.arrays import SOURCE, context_arrays, metadata_files, window_arrays
from gsae.store.format.json_files import parse, sha256, to_json
from gsae.store.format.manifest import PLAN, ArrayEntry, FileEntry, Record, WindowEntry, moments_of
from gsae.store.format.moments import Moments, MomentsBuilder, sort_by_norm
from gsae.store.format.plan import changed_fields
from gsae.store.format.row_order import SPLITS, Split
from gsae.store.places.shard import ShardReader
from gsae.store.places.transfer import checked_blocks
from gsae.store.read.store import Store

from .verify_foreign import listing, shadowing_files
from .verify_order import OrderCheck, prepare_order_check

# A bound on the rounding errors of sums in any order of additions, because another writer may use another order.
SUMS_TOLERANCE = 1e-9
SHOWN_FIELDS = 3

Check = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class VerifyProgress:
    """Checks that are done, and all checks; most of them are of one file."""

    done: int
    files: int


def verify(
    store: Store,
    deep: bool = False,
    listen: Callable[[VerifyProgress], None] = lambda _: None,
    threads: int | None = None,
) -> list[str]:
    """Return every fault of `store`, one line each, with its file; [] if the store is good.

    deep: read every byte. threads: files that are checked at a time; None for all cores. A foreign file is a fault if
    another reader would take it for a part of the store; `foreign_files` lists all of them.
    """
    order, faults = prepare_order_check(store) if deep else (None, [])
    checks = list(_Verifier(store, deep, order).checks())
    with ThreadPoolExecutor(threads or os.cpu_count(), thread_name_prefix="gsae-verify") as pool:
        for done, found in enumerate(pool.map(_collect, checks)):
            faults += found
            listen(VerifyProgress(done + 1, len(checks)))
    return list(dict.fromkeys(faults))


def _collect(check: Check) -> list[str]:
    """Run a check to its end; an error that stops it is its last fault."""
    faults: list[str] = []
    try:
        faults.extend(check())
    except GsaeError as error:
        faults.append(str(error))
    except OSError as error:
        faults.append(f"{error.filename}: {error.strerror}.")
    return faults


class _Verifier:
    """The checks of a store; each yields its faults and may run on any thread."""

    def __init__(self, store: Store, deep: bool, order: OrderCheck | None) -> None:
        self._store, self._deep, self._order = store, deep, order
        self._listing = listing(store)

    def checks(self) -> Iterator[Check]:
        """Yield every check."""
        plan, c, manifest = self._store.plan, self._store.plan.contexts, self._store.manifest
        entries = {f.path: f for f in manifest.files}
        for name, data in ({PLAN: to_json(plan)} | metadata_files(plan)).items():
            yield partial(self._metadata, entries[name], data)
        for spec in context_arrays(c.contexts, c.context_size, c.documents):
            for shard in range(spec.shards):
                yield partial(self._context_file, spec, shard, entries[spec.file(shard)])
        for window in manifest.windows:
            yield partial(self._file, window.record, True)
            for spec, entry in zip(window_arrays(plan, window.split), window.arrays, strict=True):
                yield partial(self._window_file, window, spec, entry)
        for split in SPLITS:
            yield partial(self._records, split)
        yield partial(shadowing_files, self._store, self._listing)

    def _file(self, entry: FileEntry, deep: bool) -> Iterator[str]:
        """Check the name and size of a file and, if deep, its sha256."""
        where, size = f"{self._store.name}/{entry.path}", self._listing.get(entry.path, -1)
        if size == -1:
            yield f"{where} is missing."
        elif size is None:
            yield f"{where} is a folder; a file is needed."
        elif size != entry.size:
            yield f"{where} has {size} bytes; {entry.size} were written."
        elif deep:
            try:
                deque(checked_blocks(self._store.place, entry), maxlen=0)
            except CorruptError:
                yield f"{where} was changed: its sha256 is not that of the manifest."

    def _metadata(self, entry: FileEntry, planned: bytes) -> Iterator[str]:
        """Check plan.json or Zarr metadata, which follow from the manifest's plan."""
        where = f"{self._store.name}/{entry.path}"
        if entry.sha256 != sha256(planned):
            yield f"The manifest's sum of {where} is not that of what the plan gives."
        if not isinstance(self._listing.get(entry.path), int):
            yield from self._file(entry, deep=False)
        elif (data := self._store.place.read(entry.path)) != planned:
            yield f"{where} was changed: it is not what the plan gives{_differences(data, planned)}."

    def _context_file(self, spec: ArraySpec, shard: int, entry: FileEntry) -> Iterator[str]:
        """Check a file of tokens, splits or documents. `prepare_order_check` compares the values with the plan."""
        yield from _collect(partial(self._file, entry, self._deep))
        if self._listing.get(entry.path) == entry.size:
            with self._store.shard(spec, shard, "pread") as file:
                broken: list[str] = []
                for _ in _decoded(file, broken) if self._deep else ():
                    pass
                yield from broken

    def _window_file(self, window: WindowEntry, spec: ArraySpec, entry: ArrayEntry) -> Iterator[str]:
        """Check one window of a site or of the sources: its file, its index and, if deep, chunks, sums and order."""
        yield from _collect(partial(self._file, entry.file, self._deep))
        if self._listing.get(entry.file.path) != entry.file.size:
            return
        with self._store.shard(spec, window.window, "pread") as shard:
            if not self._deep:
                return
            sites = {site.folder: site.name for site in self._store.plan.sites}
            folder = spec.path.split("/")[1]
            if folder == SOURCE:
                yield from self._sources(shard, entry, window)
            else:
                yield from self._site_rows(shard, entry, window, sites[folder])

    def _site_rows(self, shard: ShardReader, entry: ArrayEntry, window: WindowEntry, site: str) -> Iterator[str]:
        """Check the chunks, the raw sum and the moments of one window of a site."""
        broken: list[str] = []
        digest, builder = hashlib.sha256(), MomentsBuilder(shard.spec.width, shard.spec.dtype)
        for _, rows in _decoded(shard, broken):
            digest.update(rows.data)
            builder.add(rows, sort_by_norm(rows, shard.spec.dtype))
        yield from broken
        if broken:
            return
        if digest.hexdigest() != entry.raw_sha256:
            yield f"The rows of {shard.path} are not those that were recorded."
        if self._listing.get(window.record.path) != window.record.size:
            return
        recorded = self._record(window).moments.get(site)
        if recorded is None or not _agree(recorded.read(shard.spec.width), builder.moments(), SUMS_TOLERANCE):
            yield f"The moments of {site!r} in {window.record.path} are not those of the rows of {shard.path}."

    def _sources(self, shard: ShardReader, entry: ArrayEntry, window: WindowEntry) -> Iterator[str]:
        """Check the chunks, the raw sum and the order of one window of the sources."""
        broken: list[str] = []
        digest = hashlib.sha256()
        expected = self._order.sources(window.split, window.window) if self._order else None
        for chunk, rows in _decoded(shard, broken):
            digest.update(rows.data)
            first = chunk * shard.spec.chunk_rows
            part = None if expected is None else expected[first : first + len(rows)]
            if self._order and (fault := self._order.fault(window.split, rows[:, 0].view(np.int64), part)):
                yield f"{shard.path}: chunk {chunk}: {fault}"
        yield from broken
        if not broken and digest.hexdigest() != entry.raw_sha256:
            yield f"The rows of {shard.path} are not those that were recorded."

    def _records(self, split: Split) -> Iterator[str]:
        """Check the records of a split against the manifest: the entry of each window, and the moments of all."""
        store = self._store
        totals = {site.name: Moments.merged([], site.d_in) for site in store.plan.sites}
        whole = True
        for window in (w for w in store.manifest.windows if w.split == split):
            where = f"{store.name}/{window.record.path}"
            if self._listing.get(window.record.path) != window.record.size:  # a fault of another check
                whole = False
                continue
            try:
                record = self._record(window)
                if record.moments.keys() != totals.keys():
                    raise CorruptError(f"{where} does not have the moments of each site.")
                parts = {site.name: record.moments[site.name].read(site.d_in) for site in store.plan.sites}
            except GsaeError as error:
                yield str(error)
                whole = False
                continue
            if (record.split, record.window, record.arrays) != (window.split, window.window, window.arrays):
                yield f"{where} and the manifest disagree about its window."
            totals = {name: Moments.merged([totals[name], parts[name]], len(parts[name].sums.T)) for name in totals}
        for site in store.plan.sites:
            listed = moments_of(store.manifest, split, site.name, site.d_in)
            if whole and not _agree(listed, totals[site.name], 0.0):
                yield f"The {split} moments of site {site.name!r} in the manifest are not those of its records."

    def _record(self, window: WindowEntry) -> Record:
        where = f"{self._store.name}/{window.record.path}"
        return parse(Record, self._store.place.read(window.record.path), where)


def _differences(data: bytes, planned: bytes) -> str:
    """Return the first fields in which two JSON files differ, as the rest of a sentence."""
    try:
        changed = changed_fields(json.loads(planned), json.loads(data))
    except (ValueError, RecursionError, AttributeError):
        return ", and no JSON object"
    named = [f"{field} is {str(is_)[:40]}, not {str(was)[:40]}" for field, is_, was in changed[:SHOWN_FIELDS]]
    return f": {', '.join(named)}" if named else ""


def _decoded(shard: ShardReader, broken: list[str]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (chunk, rows (rows, width) as bit patterns) of every chunk; faults of the others go to `broken`."""
    for chunk in range(shard.chunks):
        rows = np.empty((shard.rows_of_chunk(chunk), shard.spec.width), unsigned(shard.spec.dtype))
        try:
            shard.decode_into(chunk, rows, np.arange(len(rows)))
        except CorruptError as error:
            broken.append(str(error))
        else:
            yield chunk, rows


def _agree(a: Moments, b: Moments, tolerance: float) -> bool:
    """Whether bins and counts are equal, and sums equal within `tolerance` of the sum of absolute values."""
    if a.non_finite != b.non_finite or not (np.array_equal(a.bins, b.bins) and np.array_equal(a.counts, b.counts)):
        return False
    size = tolerance * np.sqrt(a.counts[:, None] * a.squares)  # at least the sum of |x|
    sums, squares = np.abs(a.sums - b.sums) <= size, np.abs(a.squares - b.squares) <= tolerance * a.squares
    return bool(sums.all() and squares.all())
