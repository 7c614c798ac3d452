"""What stands in a store's place beside its own files: named always, a fault only where it could pass for part of it.

Nothing of ours reads a file that the manifest does not name. Other Zarr readers go by names, so metadata of either
Zarr version, chunks beyond an array's and records of windows that are not there would mislead them or us. Only the
store's own folders are listed, so that a link to elsewhere costs nothing.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from gsae.store.format.arrays import all_arrays
from gsae.store.format.manifest import MANIFEST, RECORDS, every_file
from gsae.store.read.store import Store

AT_A_TIME = 8
ZARR_NAMES = frozenset({"zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"})


def listing(store: Store) -> dict[str, int | None]:
    """Return the bytes of each file in the store's own folders by its path, None for a folder that is not its own."""
    own = _own_folders(store)
    found: dict[str, int | None] = {}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for folders, files in pool.map(store.place.children, sorted(own)):
            found |= files | dict.fromkeys(set(folders) - own)
    return found


def foreign_files(store: Store, found: Mapping[str, int | None] | None = None) -> list[str]:
    """Return the paths of files and folders (these with a slash at the end) that are not the store's, ascending.

    What is in such a folder is not listed; hidden folders are left out. found: the `listing`, where one is at hand.
    """
    found = listing(store) if found is None else found
    ours = {MANIFEST, *(entry.path for entry in every_file(store.manifest))}
    return sorted(path if size is not None else f"{path}/" for path, size in found.items() if path not in ours)


def shadowing_files(store: Store, found: Mapping[str, int | None]) -> Iterator[str]:
    """Yield a fault for each foreign file that a Zarr reader or gsae could take for part of the store."""
    chunks = tuple(f"{spec.path}/c/" for spec in all_arrays(store.plan))
    for path in foreign_files(store, found):
        if PurePosixPath(path).name in ZARR_NAMES or path.startswith((f"{RECORDS}/", *chunks)):
            yield f"{store.name}/{path} is not of this store, and could be taken for part of it."


def _own_folders(store: Store) -> set[str]:
    parents = (PurePosixPath(entry.path).parents for entry in every_file(store.manifest))
    return {"" if str(folder) == "." else str(folder) for above in parents for folder in above}
