"""Foreign files: those in the folders of a store that do not belong to it. Some of them are faults.

gsae reads only files that the manifest names. Other Zarr readers go by names, so that Zarr metadata, additional chunks,
and records of windows that the store lacks could be taken for part of it: those are faults. Only the store's own
folders are listed, so a link to another place costs nothing.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from gsae.store.format.arrays import all_arrays
from gsae.store.format.manifest import MANIFEST, RECORDS, every_file
from gsae.store.read.store import Store

LISTINGS_AT_ONCE = 8
ZARR_NAMES = frozenset({"zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"})


def listing(store: Store) -> dict[str, int | None]:
    """Return the bytes of each file in the store's own folders by path, and None for each foreign folder in them."""
    own = _own_folders(store)
    found: dict[str, int | None] = {}
    with ThreadPoolExecutor(LISTINGS_AT_ONCE) as pool:
        for folders, files in pool.map(store.place.children, sorted(own)):
            found |= files | dict.fromkeys(set(folders) - own)
    return found


def foreign_files(store: Store, found: Mapping[str, int | None] | None = None) -> list[str]:
    """Return the paths of files and folders (with a slash at the end) that are not the store's, ascending.

    Foreign folders are not searched, and hidden ones are left out. found: the `listing`, if it was made before.
    """
    found = listing(store) if found is None else found
    ours = {MANIFEST, *(entry.path for entry in every_file(store.manifest))}
    return sorted(path if size is not None else f"{path}/" for path, size in found.items() if path not in ours)


def shadowing_files(store: Store, found: Mapping[str, int | None]) -> Iterator[str]:
    """Yield a fault for each foreign file that a Zarr reader or gsae could take for a part of the store."""
    chunks = tuple(f"{spec.path}/c/" for spec in all_arrays(store.plan))
    for path in foreign_files(store, found):
        if PurePosixPath(path).name in ZARR_NAMES or path.startswith((f"{RECORDS}/", *chunks)):
            yield f"{store.name}/{path} is not of this store and could be taken for a part of it."


def _own_folders(store: Store) -> set[str]:
    parents = (PurePosixPath(entry.path).parents for entry in every_file(store.manifest))
    return {"" if str(folder) == "." else str(folder) for above in parents for folder in above}
