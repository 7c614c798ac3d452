"""Does a store hold what its manifest says? Every fault is listed with its file and chunk, not only the first.

The quick check looks at names, sizes, metadata, records and indexes; it reads no activations. The deep one reads
every byte: file sums, every chunk decoded, raw rows against their sums, moments made again, and each row's source
against the order that plan and tokens dictate, so that a silent shuffling fault cannot pass. Files are checked side
by side, one chunk a thread, beside two bytes a token. A file is read for its sum and again for its chunks, by pread, so
that one cut short meanwhile is a fault and not a signal. Where tokens are damaged, order cannot be checked and is not.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError, GsaeError
from gsae.store.codec.chunks import ArraySpec, unsigned
from gsae.store.format.arrays import SOURCE, context_arrays, metadata_files, window_arrays
from gsae.store.format.manifest import PLAN, ArrayEntry, FileEntry, Record, WindowEntry, moments_of
from gsae.store.format.moments import Moments, Sums, by_norm
from gsae.store.format.plan import canonical_json, changed_fields, parse, sha256
from gsae.store.format.row_order import SPLITS, Split
from gsae.store.places.folder import checked
from gsae.store.places.shard import Shard
from gsae.store.read.store import Store

from .verify_foreign import listing, shadowing_files
from .verify_order import Expected, expect

# Of what n additions of these sizes can be off by, whatever their order: a writer may add as it likes.
SUMS_TOLERANCE = 1e-9
SHOWN_FIELDS = 3


@dataclass(frozen=True)
class Checked:
    """Progress of a verification: checks done, checks in all; a check is about a file."""

    done: int
    files: int


def verify(
    store: Store,
    deep: bool = False,
    listen: Callable[[Checked], None] = lambda _: None,
    threads: int | None = None,
) -> list[str]:
    """Return every fault found in `store`, one line each, with its file; an empty list is a good store.

    threads: files that are checked at a time, all cores if None. Files that are not the store's are faults where
    another reader would take them for part of it; `foreign_files` lists all of them.
    """
    expected, faults = expect(store) if deep else (None, [])
    there = listing(store)
    checks = list(_checks(store, there, deep, expected))
    with ThreadPoolExecutor(threads or os.cpu_count(), thread_name_prefix="gsae-verify") as pool:
        for done, found in enumerate(pool.map(_collect, checks)):
            faults += found
            listen(Checked(done + 1, len(checks)))
    return list(dict.fromkeys(faults))


Check = Callable[[], Iterator[str]]
Listing = Mapping[str, int | None]


def _checks(store: Store, there: Listing, deep: bool, expected: Expected | None) -> Iterator[Check]:
    plan, c = store.plan, store.plan.contexts
    listed = {f.path: f for f in store.manifest.files}
    for name, data in ({PLAN: canonical_json(plan.model_dump(mode="json"))} | metadata_files(plan)).items():
        yield partial(_metadata_faults, store, there, listed[name], data)
    for spec in context_arrays(c.contexts, c.context_size, c.documents):
        for shard in range(spec.shards):
            yield partial(_small_faults, store, there, spec, shard, listed[spec.file(shard)], deep)
    for window in store.manifest.windows:
        yield partial(_file_faults, store, there, window.record, True)
        for spec, entry in zip(window_arrays(plan, window.split), window.arrays, strict=True):
            yield partial(_array_faults, store, there, window, spec, entry, deep, expected)
    for split in SPLITS:
        yield partial(_record_faults, store, there, split)
    yield partial(shadowing_files, store, there)


def _collect(check: Check) -> list[str]:
    """Run a check to its end, or to the error that stops it, which is then its last fault."""
    faults: list[str] = []
    try:
        faults.extend(check())
    except GsaeError as error:
        faults.append(str(error))
    except OSError as error:
        faults.append(f"{error.filename}: {error.strerror}.")
    return faults


def _file_faults(store: Store, there: Listing, entry: FileEntry, deep: bool) -> Iterator[str]:
    """Name, size and, when deep, the sum of a file."""
    size = there.get(entry.path, -1)
    if size == -1:
        yield f"{store.name}/{entry.path} is missing."
    elif size is None:
        yield f"{store.name}/{entry.path} is a folder; a file is needed."
    elif size != entry.size:
        yield f"{store.name}/{entry.path} has {size} bytes; {entry.size} were written."
    elif deep:
        try:
            deque(checked(store.place, entry), maxlen=0)
        except CorruptError:
            yield f"{store.name}/{entry.path} was changed: its sha256 is not that of the manifest."


def _metadata_faults(store: Store, there: Listing, entry: FileEntry, due: bytes) -> Iterator[str]:
    """The plan and the Zarr metadata, shapes, codecs and dtypes in it, are functions of the manifest's plan."""
    where = f"{store.name}/{entry.path}"
    if entry.sha256 != sha256(due):
        yield f"The manifest's sum of {where} is not that of what the plan gives."
    if not isinstance(there.get(entry.path), int):
        yield from _file_faults(store, there, entry, deep=False)
    elif (data := store.place.read(entry.path)) != due:
        yield f"{where} was changed: it is not what the plan gives{_differences(data, due)}."


def _differences(data: bytes, due: bytes) -> str:
    try:
        changed = changed_fields(json.loads(due), json.loads(data))
    except (ValueError, RecursionError, AttributeError):
        return ", and no JSON object"
    named = [f"{field} is {str(is_)[:40]}, not {str(was)[:40]}" for field, is_, was in changed[:SHOWN_FIELDS]]
    return f": {', '.join(named)}" if named else ""


def _small_faults(
    store: Store, there: Listing, spec: ArraySpec, shard: int, entry: FileEntry, deep: bool
) -> Iterator[str]:
    """A file of tokens, splits or documents; what is in it is compared with the plan by `expect`."""
    yield from _collect(partial(_file_faults, store, there, entry, deep))
    if there.get(entry.path) == entry.size:
        with store.shard(spec, shard, "pread") as file:
            broken: list[str] = []
            for _ in _decoded(file, broken) if deep else ():
                pass
            yield from broken


def _array_faults(
    store: Store,
    there: Listing,
    window: WindowEntry,
    spec: ArraySpec,
    entry: ArrayEntry,
    deep: bool,
    expected: Expected | None,
) -> Iterator[str]:
    """One window of a site or of the sources: its file, its index and, when deep, its chunks, sums and order."""
    yield from _collect(partial(_file_faults, store, there, entry.file, deep))
    if there.get(entry.file.path) != entry.file.size:
        return
    with store.shard(spec, window.window, "pread") as shard:
        if not deep:
            return
        sites = {site.folder: site.name for site in store.plan.sites}
        folder = spec.path.split("/")[1]
        if folder == SOURCE:
            yield from _source_faults(shard, entry, window, expected)
        else:
            yield from _site_faults(store, there, shard, entry, window, sites[folder])


def _decoded(shard: Shard, broken: list[str]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (chunk, rows (rows, width) as bit patterns) of every chunk; what is wrong with others goes to `broken`."""
    for chunk in range(shard.chunks):
        rows = np.empty((shard.chunk_rows(chunk), shard.spec.width), unsigned(shard.spec.dtype))
        try:
            shard.decode_into(chunk, rows, np.arange(len(rows)))
        except CorruptError as error:
            broken.append(str(error))
        else:
            yield chunk, rows


def _site_faults(
    store: Store, there: Listing, shard: Shard, entry: ArrayEntry, window: WindowEntry, site: str
) -> Iterator[str]:
    """Chunks, raw sum and moments of one window of a site."""
    broken: list[str] = []
    digest, sums = hashlib.sha256(), Sums(shard.spec.width, shard.spec.dtype)
    for _, rows in _decoded(shard, broken):
        digest.update(rows.data)
        sums.add(rows, by_norm(rows, shard.spec.dtype))
    yield from broken
    if broken:
        return
    if digest.hexdigest() != entry.raw_sha256:
        yield f"The rows of {shard.path} are not those that were recorded."
    if there.get(window.record.path) != window.record.size:
        return
    recorded = _record(store, window).moments.get(site)
    if recorded is None or not _agree(recorded.read(shard.spec.width), sums.moments(), SUMS_TOLERANCE):
        yield f"The moments of {site!r} in {window.record.path} are not those of the rows of {shard.path}."


def _source_faults(shard: Shard, entry: ArrayEntry, window: WindowEntry, expected: Expected | None) -> Iterator[str]:
    """Chunks, raw sum and order of one window of the sources."""
    broken: list[str] = []
    digest = hashlib.sha256()
    due = expected.sources(window.split, window.window) if expected else None
    for chunk, rows in _decoded(shard, broken):
        digest.update(rows.data)
        first = chunk * shard.spec.chunk_rows
        part = None if due is None else due[first : first + len(rows)]
        if expected and (fault := expected.fault(window.split, rows[:, 0].view(np.int64), part)):
            yield f"{shard.path}: chunk {chunk}: {fault}"
    yield from broken
    if not broken and digest.hexdigest() != entry.raw_sha256:
        yield f"The rows of {shard.path} are not those that were recorded."


def _record_faults(store: Store, there: Listing, split: Split) -> Iterator[str]:
    """The records of a split against the manifest: each window's entry, and the moments of all of them together."""
    totals = {site.name: Moments.merged([], site.d_in) for site in store.plan.sites}
    whole = True
    for window in (w for w in store.manifest.windows if w.split == split):
        where = f"{store.name}/{window.record.path}"
        if there.get(window.record.path) != window.record.size:  # told by another check
            whole = False
            continue
        try:
            record = _record(store, window)
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


def _record(store: Store, window: WindowEntry) -> Record:
    return parse(Record, store.place.read(window.record.path), f"{store.name}/{window.record.path}")


def _agree(a: Moments, b: Moments, tolerance: float) -> bool:
    """Whether bins and counts are equal, and sums equal but for `tolerance` of what was added up."""
    if a.non_finite != b.non_finite or not (np.array_equal(a.bins, b.bins) and np.array_equal(a.counts, b.counts)):
        return False
    size = tolerance * np.sqrt(a.counts[:, None] * a.squares)  # at least the sum of |x|
    sums, squares = np.abs(a.sums - b.sums) <= size, np.abs(a.squares - b.squares) <= tolerance * a.squares
    return bool(sums.all() and squares.all())
