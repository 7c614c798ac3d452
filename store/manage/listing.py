"""The stores under a folder or URL: model, sites, rows, size and state, from their manifests and plans alone.

It costs one listing for each folder, and one or two small files for each store.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gsae.errors import GsaeError
from gsae.store.format.arrays import split_rows
from gsae.store.format.json_files import parse
from gsae.store.format.manifest import MANIFEST, PLAN, every_file
from gsae.store.format.plan import Plan
from gsae.store.format.row_order import SPLITS
from gsae.store.places.pending_tokens import TOKENS, TOKENS_BEGUN, TOKENS_ONLY, UNFINISHED_TOKENS, read_tokens
from gsae.store.places.place import Place, place_at
from gsae.store.read.store import find_manifest, recorded

DEEPEST = 8


@dataclass(frozen=True)
class StoreSummary:
    """A store in a listing. bytes: the size of all its files.

    state: `complete`, `sealed`, `unfinished (n of m windows)`, `tokens only`, `unfinished tokens`, or `unreadable` and
    the error. model, sites and rows (by split) are None, () and {} if they are not known yet or cannot be read.
    """

    path: str
    model: str | None
    sites: tuple[str, ...]
    rows: dict[str, int]
    bytes: int
    state: str


def list_stores(root: str | Path) -> list[StoreSummary]:
    """Return the stores at and under `root`, by path. Raises RemoteError if a server does not answer."""
    where = place_at(root)
    return [_summary(where, folder, files) for folder, files in _stores(where, "", DEEPEST)]


def _stores(where: Place, folder: str, deeper: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the folder of each store, and the files directly in it with their sizes."""
    folders, files = where.children(folder)
    names = {path.rsplit("/", 1)[-1] for path in files}
    if {PLAN, MANIFEST} & names or _has_tokens(where, folder, folders):
        yield folder, files
    elif deeper:
        for each in folders:
            yield from _stores(where, each, deeper - 1)


def _has_tokens(where: Place, folder: str, folders: list[str]) -> bool:
    """Whether a folder holds tokens of a store without a plan."""
    own = f"{folder}/{TOKENS}".lstrip("/")
    return own in folders and f"{folder}/{TOKENS_BEGUN}".lstrip("/") in where.children(own)[1]


def _summary(where: Place, folder: str, files: dict[str, int]) -> StoreSummary:
    path = f"{where.name}/{folder}" if folder else where.name
    try:
        if f"{folder}/{MANIFEST}".lstrip("/") in files:
            return _complete(path)
        if f"{folder}/{PLAN}".lstrip("/") not in files:
            return _tokens_only(path)
        plan = parse(Plan, where.read(f"{folder}/{PLAN}".lstrip("/")), f"{path}/{PLAN}")
        windows = plan.windows + plan.heldout_windows
        state = f"unfinished ({len(recorded(place_at(path), plan))} of {windows} windows)"
        return _facts(path, plan, _bytes_below(place_at(path), ""), state)
    except GsaeError as error:
        return StoreSummary(path, None, (), {}, sum(files.values()), f"unreadable: {error}")


def _tokens_only(path: str) -> StoreSummary:
    made = read_tokens(place_at(path))[1]
    rows = {"train": made.rows, "heldout": made.heldout_rows} if made else {}
    return StoreSummary(
        path, None, (), rows, _bytes_below(place_at(path), ""), TOKENS_ONLY if made else UNFINISHED_TOKENS
    )


def _complete(path: str) -> StoreSummary:
    manifest, data = find_manifest(place_at(path))
    size = sum(entry.size for entry in every_file(manifest)) + len(data)
    rows = dict.fromkeys(map(str, SPLITS), 0)
    for window in manifest.windows:
        rows[window.split] += window.arrays[0].rows
    return replace(_facts(path, manifest.plan, size, "sealed" if manifest.sealed else "complete"), rows=rows)


def _facts(path: str, plan: Plan, size: int, state: str) -> StoreSummary:
    sites = tuple(site.name for site in plan.sites)
    return StoreSummary(path, plan.model.id, sites, {split: split_rows(plan, split) for split in SPLITS}, size, state)


def _bytes_below(where: Place, folder: str) -> int:
    folders, files = where.children(folder)
    return sum(files.values()) + sum(_bytes_below(where, each) for each in folders)
