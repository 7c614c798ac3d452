"""Records and the manifest: what was written, the sha256 of each file, and the identity of the store's content.

A record is published after the files of its window, and the manifest last: a store is complete if it has one. The
manifest is a pure function of plan and records (no times, no hosts), so that any worker may write it and all write the
same bytes. `digest` identifies the content and does not depend on the codec; SAEs keep it. The windows of a store are
those that its manifest lists: all of the plan's, or some of them in a sealed store.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from gsae.errors import CorruptError

from .arrays import context_arrays, metadata_files, split_windows, window_arrays
from .json_files import (
    SCHEMA_VERSION,
    Count,
    OmitsDefaults,
    Positive,
    Sha256,
    StoredValue,
    Text,
    canonical_json,
    parse,
    sha256,
)
from .moments import ZERO_BIN, Moments, MomentsRecord
from .plan import Plan
from .row_order import SPLITS, Split

MANIFEST = "manifest.json"
PLAN = "plan.json"
POSSIBLE_BINS = 8 * 512  # ||x||^2 of float32 rows lies within 2^-298 and 2^276
RECORDS = "shards"


def _inside(path: str) -> str:
    if {".", ".."} & set(path.split("/")):
        raise ValueError("a path inside the store")
    return path


SafePath = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$", max_length=400), AfterValidator(_inside)
]


class FileEntry(StoredValue):
    """A file of the store; `path` is relative to it."""

    path: SafePath
    size: Count
    sha256: Sha256


class ArrayEntry(StoredValue):
    """One window of one array: its shard file, and the sha256 of its raw little-endian rows."""

    array: SafePath
    rows: Positive
    raw_sha256: Sha256
    file: FileEntry


class Record(StoredValue):
    """A finished window: its arrays (sites in the plan's order, sources last) and the moments of each site by name."""

    schema_version: str
    split: Literal["train", "heldout"]
    window: Count
    arrays: tuple[ArrayEntry, ...]
    moments: dict[str, MomentsRecord]


class WindowEntry(StoredValue):
    """A window in the manifest: its record without the moments, and the entry of the record's file."""

    split: Literal["train", "heldout"]
    window: Count
    arrays: tuple[ArrayEntry, ...]
    record: FileEntry


class Confirmed(StoredValue):
    """The tests that each site passed on the loaded model, kept beside the plan until the manifest has them."""

    schema_version: str
    sites: dict[str, tuple[Text, ...]]


class Manifest(OmitsDefaults):
    """Plan, windows and totals of a complete store. `sha256` is that of the other fields in canonical JSON.

    sealed: some of the plan's windows are missing and will never be written. confirmed: by site, the tests that it
    passed on the loaded model (docs/format.md); None if the model was not tested.
    """

    schema_version: str
    plan: Plan
    sealed: bool = False
    confirmed: dict[str, tuple[Text, ...]] | None = None
    files: tuple[FileEntry, ...]
    windows: tuple[WindowEntry, ...]
    moments: dict[str, dict[str, MomentsRecord]]
    digest: Sha256
    files_digest: Sha256
    sha256: Sha256


def record_name(split: Split, window: int) -> str:
    """Return the path of a window's record."""
    return f"{RECORDS}/{split}-{window:05d}.json"


def all_windows(plan: Plan) -> list[tuple[Split, int]]:
    """List the windows of a store in the order of work: held-out first, so that an interrupted harvest has them."""
    return [(split, w) for split in reversed(SPLITS) for w in range(split_windows(plan, split))]


class WindowTotals:
    """What the manifest has of windows: the entry of each, and the moments of their rows. They are added in order.

    A harvest adds windows while it makes later ones, because reading a record takes about a twentieth of the time in
    which a GPU makes its window.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.windows: list[WindowEntry] = []
        self._moments = {split: {site.name: Moments.merged([], site.d_in) for site in plan.sites} for split in SPLITS}

    def is_next(self, split: Split, window: int) -> bool:
        """Return whether this window follows those that were added, in the order of `all_windows`."""
        added, heldout = len(self.windows), split_windows(self._plan, "heldout")
        return (split, window) == (("heldout", added) if added < heldout else ("train", added - heldout))

    def add(self, entry: FileEntry, record: Record, moments: Mapping[str, Moments] | None = None) -> None:
        """Add a window. entry: of the file of the record. moments: of the record by site; None to read them from it."""
        self.windows.append(WindowEntry(split=record.split, window=record.window, arrays=record.arrays, record=entry))
        held = self._moments[record.split]
        for site in self._plan.sites:
            new = record.moments[site.name].read(site.d_in) if moments is None else moments[site.name]
            held[site.name] = Moments.merged([held[site.name], new], site.d_in)

    def moments(self) -> dict[str, dict[str, MomentsRecord]]:
        """Return the moments of all rows, by split and site."""
        return {split: {name: m.to_record() for name, m in sites.items()} for split, sites in self._moments.items()}


def build(
    plan: Plan, files: list[FileEntry], totals: WindowTotals, confirmed: Mapping[str, tuple[str, ...]]
) -> Manifest:
    """Return the manifest of a store, sealed if the totals are not those of all windows of the plan.

    files: plan.json, Zarr metadata and context arrays. confirmed: the tests that sites passed; those of other sites are
    left out.
    """
    windows = totals.windows
    ordered = sorted(files, key=lambda f: f.path)
    body: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "plan": plan.model_dump(mode="json"),
        "files": [f.model_dump(mode="json") for f in ordered],
        "windows": [w.model_dump(mode="json") for w in windows],
        "moments": {
            split: {name: m.model_dump(mode="json") for name, m in sites.items()}
            for split, sites in totals.moments().items()
        },
        "digest": digest(plan, windows),
        "files_digest": files_digest(ordered, windows),
    }
    if len(windows) < plan.windows + plan.heldout_windows:
        body["sealed"] = True
    if tests := {site.name: list(confirmed[site.name]) for site in plan.sites if site.name in confirmed}:
        body["confirmed"] = tests
    return parse(Manifest, canonical_json(body | {"sha256": sha256(canonical_json(body))}), MANIFEST)


def listed_files(plan: Plan) -> list[str]:
    """Return the paths of all files outside the windows, ascending: the plan, Zarr metadata, tokens and documents."""
    c = plan.contexts
    small = context_arrays(c.contexts, c.context_size, c.documents)
    return sorted([PLAN, *metadata_files(plan), *(spec.file(i) for spec in small for i in range(spec.shards))])


def every_file(manifest: Manifest) -> list[FileEntry]:
    """Return the entries of all files of a store but the manifest: small ones, then shards, then records."""
    windows = manifest.windows
    return [*manifest.files, *(a.file for w in windows for a in w.arrays), *(w.record for w in windows)]


def files_digest(files: Sequence[FileEntry], windows: Sequence[WindowEntry]) -> str:
    """Return the sha256 of the entries of all files but the manifest: `files`, then shards, then records."""
    every = [*files, *(a.file for w in windows for a in w.arrays), *(w.record for w in windows)]
    return sha256(canonical_json([f.model_dump(mode="json") for f in every]))


def digest(plan: Plan, windows: list[WindowEntry]) -> str:
    """Return the identity of the content: the sha256 of the semantic plan and of the sums of raw rows by window."""
    content = {
        "plan": plan.semantic(),
        "rows": [[a.array, w.window, a.raw_sha256] for w in windows for a in w.arrays],
    }
    return sha256(canonical_json(content))


def read_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest and check it: sums, digest, windows and files. Raises CorruptError or IncompatibleError.

    where: names the file in errors.
    """
    manifest = parse(Manifest, data, where)
    body = manifest.model_dump(mode="json", exclude={"sha256"})
    found = sha256(canonical_json(body))
    if found != manifest.sha256:
        raise CorruptError(f"{where} has sha256 {found[:12]}…; it says {manifest.sha256[:12]}…, so it was changed.")
    if digest(manifest.plan, list(manifest.windows)) != manifest.digest:
        raise CorruptError(f"The digest in {where} is not that of its plan and rows.")
    _check_windows(manifest, where)
    _check_files(manifest, where)
    return manifest


def _check_windows(manifest: Manifest, where: str) -> None:
    """Check that windows are the plan's, each once and in order (some of them, if sealed), with the plan's arrays."""
    plan = manifest.plan
    planned = plan.windows + plan.heldout_windows  # counted, not listed: a forged plan may have any number
    found = [(SPLITS[::-1].index(w.split), w.window) for w in manifest.windows]
    inside = all(w.window < split_windows(plan, w.split) for w in manifest.windows)
    if not inside or found != sorted(set(found)) or manifest.sealed != (len(found) < planned):
        raise CorruptError(f"{where} does not list the {planned} windows of its plan.")
    for window in manifest.windows:
        specs = window_arrays(plan, window.split)
        expected = [(s.path, s.file(window.window), s.rows_of_shard(window.window)) for s in specs]
        if [(a.array, a.file.path, a.rows) for a in window.arrays] != expected:
            raise CorruptError(f"{where} does not give {window.split} window {window.window} the arrays of its plan.")
    names = {site.name for site in plan.sites}
    if set(manifest.moments) != set(SPLITS) or any(set(sites) != names for sites in manifest.moments.values()):
        raise CorruptError(f"{where} does not have the moments of each site and split.")


def _check_files(manifest: Manifest, where: str) -> None:
    """Check that the other files are the plan's; they are counted first, as a forged plan may have any number."""
    c = manifest.plan.contexts
    shards = sum(spec.shards for spec in context_arrays(c.contexts, c.context_size, c.documents))
    if shards > len(manifest.files) or [f.path for f in manifest.files] != listed_files(manifest.plan):
        raise CorruptError(f"{where} does not list the files of its plan.")
    if any(w.record.path != record_name(w.split, w.window) for w in manifest.windows):
        raise CorruptError(f"{where} gives a window the name of another record.")
    if files_digest(manifest.files, manifest.windows) != manifest.files_digest:
        raise CorruptError(f"The files_digest in {where} is not that of its files.")


def moments_of(manifest: Manifest, split: Split, site: str, d_in: int) -> Moments:
    """Return the moments of a site over a split. Raises CorruptError if no rows can have them."""
    try:
        moments = manifest.moments[split][site].read(d_in)
    except CorruptError as error:
        raise CorruptError(f"{MANIFEST}, {split} {site!r}: {error}") from None
    rows = sum(w.arrays[0].rows for w in manifest.windows if w.split == split)
    if sum(moments.counts.tolist()) + moments.non_finite != rows:
        raise CorruptError(f"{MANIFEST}, {split} {site!r}: the moments count another number of rows than {rows}.")
    finite = np.isfinite(moments.sums).all() and np.isfinite(moments.squares).all() and (moments.squares >= 0).all()
    bins = moments.bins[moments.bins != ZERO_BIN]
    if not (finite and (moments.counts > 0).all() and (np.abs(bins) < POSSIBLE_BINS).all()):
        raise CorruptError(f"{MANIFEST}, {split} {site!r}: no rows can have these moments.")
    return moments
