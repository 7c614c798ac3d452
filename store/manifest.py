"""Records and the manifest: what was written, with the sums that prove it, and the store's identity.

A record is published after its window's files; the manifest last, and a store is complete when it exists. The
manifest is a pure function of plan and records (no times, no hosts), so any worker may write it and all write the
same bytes. `digest` names the content and survives re-encoding: it is what an SAE remembers.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from .arrays import windows_of
from .errors import CorruptError
from .moments import Moments, MomentsRecord
from .order import SPLITS, Split
from .plan import SCHEMA_VERSION, Count, Frozen, Plan, Positive, Sha256, canonical_json, parse, sha256

MANIFEST = "manifest.json"
PLAN = "plan.json"


def _inside(path: str) -> str:
    if {".", ".."} & set(path.split("/")):
        raise ValueError(f"{path!r} leads out of the store")
    return path


SafePath = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$", max_length=400), AfterValidator(_inside)
]


class FileEntry(Frozen):
    """A file of the store; `path` is relative to it."""

    path: SafePath
    size: Count
    sha256: Sha256


class ArrayEntry(Frozen):
    """One window of one array: its shard file, and the sha256 of its raw little-endian rows."""

    array: SafePath
    rows: Positive
    raw_sha256: Sha256
    file: FileEntry


class Record(Frozen):
    """A finished window: its arrays (sites in the plan's order, then the sources) and the moments of each site."""

    schema_version: str
    split: Literal["train", "heldout"]
    window: Count
    arrays: tuple[ArrayEntry, ...]
    moments: dict[str, MomentsRecord]


class WindowEntry(Frozen):
    """What the manifest keeps of a record: all but the moments, and the record's own sum."""

    split: Literal["train", "heldout"]
    window: Count
    arrays: tuple[ArrayEntry, ...]
    record: FileEntry


class Manifest(Frozen):
    """Plan, windows and totals of a complete store. `sha256` is that of the other fields in canonical JSON."""

    schema_version: str
    plan: Plan
    files: tuple[FileEntry, ...]
    windows: tuple[WindowEntry, ...]
    moments: dict[str, dict[str, MomentsRecord]]
    digest: Sha256
    files_digest: Sha256
    sha256: Sha256


def record_name(split: Split, window: int) -> str:
    """Return the path of a window's record."""
    return f"shards/{split}-{window:05d}.json"


def all_windows(plan: Plan) -> list[tuple[Split, int]]:
    """List the windows of a store in the order of work: held-out first, so that a harvest cut short has them."""
    return [(split, w) for split in reversed(SPLITS) for w in range(windows_of(plan, split))]


def build(plan: Plan, files: list[FileEntry], records: list[tuple[FileEntry, Record]]) -> Manifest:
    """Return the manifest of a complete store.

    files: plan.json, Zarr metadata and context arrays. records: in the order of `all_windows`, each with its file.
    """
    windows = [WindowEntry(split=r.split, window=r.window, arrays=r.arrays, record=entry) for entry, r in records]
    moments = {
        split: {
            site.name: Moments.merged(
                [r.moments[site.name].read(site.d_in) for _, r in records if r.split == split], site.d_in
            ).to_record()
            for site in plan.sites
        }
        for split in SPLITS
    }
    ordered = sorted(files, key=lambda f: f.path)
    every = ordered + [a.file for w in windows for a in w.arrays] + [w.record for w in windows]
    body: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "plan": plan.model_dump(mode="json"),
        "files": [f.model_dump(mode="json") for f in ordered],
        "windows": [w.model_dump(mode="json") for w in windows],
        "moments": {s: {n: m.model_dump(mode="json") for n, m in sites.items()} for s, sites in moments.items()},
        "digest": digest(plan, windows),
        "files_digest": sha256(canonical_json([f.model_dump(mode="json") for f in every])),
    }
    return parse(Manifest, canonical_json(body | {"sha256": sha256(canonical_json(body))}), MANIFEST)


def digest(plan: Plan, windows: list[WindowEntry]) -> str:
    """Return the identity of the content: the plan's meaning, the tokens, and the raw rows in window order."""
    content = {
        "plan": plan.semantic(),
        "rows": [[a.array, w.window, a.raw_sha256] for w in windows for a in w.arrays],
    }
    return sha256(canonical_json(content))


def read_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest and check its own sum and digest; raises CorruptError or IncompatibleError."""
    manifest = parse(Manifest, data, where)
    body = manifest.model_dump(mode="json", exclude={"sha256"})
    found = sha256(canonical_json(body))
    if found != manifest.sha256:
        raise CorruptError(f"{where} has sha256 {found[:12]}…; it says {manifest.sha256[:12]}…: it was changed.")
    if digest(manifest.plan, list(manifest.windows)) != manifest.digest:
        raise CorruptError(f"{where} holds a digest that its own plan and rows do not give.")
    expected = all_windows(manifest.plan)
    if [(w.split, w.window) for w in manifest.windows] != expected:
        raise CorruptError(f"{where} does not list the {len(expected)} windows that its plan has.")
    return manifest


def moments_of(manifest: Manifest, split: Split, site: str, d_in: int) -> Moments:
    """Return the moments of a site over a split."""
    return manifest.moments[split][site].read(d_in)
