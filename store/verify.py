"""Does a store hold what its manifest says? All faults are listed, not only the first.

The quick check looks at names, sizes, metadata and records; it reads no activations. The deep one reads every byte:
file sums, every chunk decoded, raw rows against their sums, moments made again, and each row's source against the
order that the plan and the tokens dictate, so that a silent shuffling fault cannot pass. Costs one read of the store.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .arrays import SOURCE, metadata_files, rows_of, site_array, window_arrays
from .chunks import ArraySpec
from .contexts import check_contexts
from .errors import GsaeError
from .manifest import PLAN, FileEntry, Record, WindowEntry
from .mapped import Shard
from .moments import Moments
from .order import SPLITS, Layout, Mask, layout, row_mask, stored_order
from .plan import canonical_json, parse, sha256
from .publish import hash_file, raw_sha256, read_file
from .reader import Store


@dataclass(frozen=True)
class Checked:
    """Progress of a verification: files done, files in all."""

    done: int
    files: int


def verify(store: Store, deep: bool = False, listen: Callable[[Checked], None] = lambda _: None) -> list[str]:
    """Return every fault found in `store`, one line each; an empty list is a good store."""
    every = _files(store)
    faults: list[str] = []
    for done, entry in enumerate(every):
        faults += _file_faults(store.path, entry, deep)
        listen(Checked(done + 1, len(every)))
    faults += _plan_faults(store)
    for window in store.manifest.windows:
        faults += _collect(_record_faults(store, window))
    if deep and not faults:
        faults += _collect(_context_faults(store))
        faults += _collect(_rows_faults(store))
    return faults


def _files(store: Store) -> list[FileEntry]:
    windows = store.manifest.windows
    return [*store.manifest.files, *(f for w in windows for f in (*(a.file for a in w.arrays), w.record))]


def _collect(check: Iterator[str]) -> list[str]:
    """Run a check to its end, or to the error that stops it, which is then its last fault."""
    faults: list[str] = []
    try:
        faults.extend(check)
    except GsaeError as error:
        faults.append(str(error))
    return faults


def _file_faults(root: Path, entry: FileEntry, deep: bool) -> Iterator[str]:
    path = root / entry.path
    if not path.is_file():
        yield f"{path} is missing."
    elif path.stat().st_size != entry.size:
        yield f"{path} has {path.stat().st_size} bytes; {entry.size} were written."
    elif (deep or path.suffix == ".json") and hash_file(path) != entry.sha256:
        yield f"{path} was changed: its sha256 is not that of the manifest."


def _plan_faults(store: Store) -> Iterator[str]:
    """The plan and the Zarr metadata are functions of the manifest's plan."""
    expected = {PLAN: canonical_json(store.plan.model_dump(mode="json"))} | metadata_files(store.plan)
    listed = {f.path: f for f in store.manifest.files}
    for name, data in expected.items():
        if name not in listed:
            yield f"{store.path / name} is not in the manifest."
        elif listed[name].sha256 != sha256(data):
            yield f"{store.path / name} is not what the plan gives."


def _record_faults(store: Store, window: WindowEntry) -> Iterator[str]:
    where = store.path / window.record.path
    record = parse(Record, read_file(where), str(where))
    if (record.split, record.window, record.arrays) != (window.split, window.window, window.arrays):
        yield f"{where} and the manifest disagree about its window."
    specs = window_arrays(store.plan, window.split)
    expected = [(s.path, s.file(window.window), s.rows_of_shard(window.window)) for s in specs]
    if [(a.array, a.file.path, a.rows) for a in record.arrays] != expected:
        yield f"{where} does not name the arrays, files and rows that the plan has for its window."
    for spec, entry in zip(specs, record.arrays, strict=False):
        yield from _collect(_index_faults(store.path, spec, window.window, entry.file.size))


def _index_faults(root: Path, spec: ArraySpec, shard: int, size: int) -> Iterator[str]:
    path = root / spec.file(shard)
    if path.is_file() and path.stat().st_size == size:  # else reported already
        Shard(root, spec, shard, size).close()
    yield from ()


def _context_faults(store: Store) -> Iterator[str]:
    yield from check_contexts(store.path, store.plan.contexts)


def _rows_faults(store: Store) -> Iterator[str]:
    mask = row_mask(store.tokens(), store.plan.tokenizer.excluded_ids, store.plan.dropped_positions)
    for split in SPLITS:
        plan = store.plan
        budget = plan.rows if split == "train" else None
        laid = layout(store.split(), mask.sum(axis=1), split, plan.seed, plan.window_rows, budget)
        if laid.rows != rows_of(plan, split):
            yield f"The tokens of {store.path} give {laid.rows} {split} rows; the plan says {rows_of(plan, split)}."
            continue
        totals: dict[str, list[Moments]] = {site.name: [] for site in plan.sites}
        for window in (w for w in store.manifest.windows if w.split == split):
            yield from _collect(_window_faults(store, window, laid, mask, totals))
        for site in plan.sites:
            total = Moments.merged(totals[site.name], site.d_in).to_record()
            if total != store.manifest.moments[split][site.name]:
                yield f"The {split} moments of site {site.name!r} in the manifest are not those of its rows."


def _window_faults(
    store: Store,
    window: WindowEntry,
    laid: Layout,
    mask: Mask,
    totals: dict[str, list[Moments]],
) -> Iterator[str]:
    plan = store.plan
    record = parse(Record, read_file(store.path / window.record.path), window.record.path)
    names = {s.folder: s.name for s in plan.sites}
    for entry in record.arrays:
        folder = entry.array.split("/")[1]
        with Shard(store.path, site_array(plan, window.split, folder), window.window, entry.file.size) as shard:
            rows = shard.read()
        if raw_sha256([rows]) != entry.raw_sha256:
            yield f"The rows of {store.path / entry.file.path} are not those that were recorded."
        if folder == SOURCE:
            own = laid.window(window.window)
            laid_sources = own.sources(mask[own.contexts])
            due = laid_sources[stored_order(own, window.split, plan.seed)]
            if not np.array_equal(rows[:, 0].view(np.int64), due):
                yield f"The sources in {store.path / entry.file.path} are not in the order that the plan dictates."
            continue
        moments = Moments.of(rows, plan.model.dtype)
        totals[names[folder]].append(moments)
        if moments.to_record() != record.moments[names[folder]]:
            yield f"The moments of {names[folder]!r} in {window.record.path} are not those of its rows."
