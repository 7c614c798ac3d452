"""Making a complete store of an interrupted harvest, from the windows that are finished.

The plan stays as it is; the manifest lists the finished windows and is marked as sealed, and the store never changes
after that. Every window is a random sample of contexts, so any of them are a representative, smaller data set. Zarr
readers see NaN for the rows of the missing windows.
"""

from contextlib import suppress
from pathlib import Path

from gsae.errors import IncompatibleError, NotFoundError
from gsae.files import sweep
from gsae.store.format.arrays import window_arrays
from gsae.store.format.manifest import PLAN, all_windows, record_name
from gsae.store.format.row_order import Split
from gsae.store.places.pending_tokens import read_tokens
from gsae.store.read.store import Store, is_complete, open_store
from gsae.store.write.window_writer import read_plan, unfinished, write_manifest


def seal(root: Path) -> Store:
    """Publish the finished windows of the harvest in `root` as a complete store, and return it.

    A complete store is returned unchanged. Stop the harvest first: it cannot write more windows afterwards. Raises
    NotFoundError if there is no harvest, IncompatibleError if no train window is finished.
    """
    plan = read_plan(root)
    if plan is None:
        if read_tokens(root)[0] is not None:
            raise IncompatibleError(
                f"{root} has only its tokens so far, and no window to seal. Run its `gsae harvest`."
            )
        raise NotFoundError(f"{root} holds no harvest: it has no {PLAN}.")
    if not is_complete(root):
        missing = set(unfinished(root, plan))
        finished = [window for window in all_windows(plan) if window not in missing]
        if not any(split == "train" for split, _ in finished):
            raise IncompatibleError(
                f"No train window of {root} is finished, so there is nothing to seal. Run its `gsae harvest` first."
            )
        write_manifest(root, plan, finished)
    store = open_store(root)
    _remove_unfinished(store)
    sweep(root)
    return store


def _remove_unfinished(store: Store) -> None:
    """Remove the files of windows that are not in the manifest: some arrays of each, without the others."""
    listed = {(w.split, w.window) for w in store.manifest.windows}
    for split, window in all_windows(store.plan):
        if (split, window) not in listed:
            for name in _names(store, split, window):
                _remove(store.path / name)


def _names(store: Store, split: Split, window: int) -> list[str]:
    return [record_name(split, window), *(spec.file(window) for spec in window_arrays(store.plan, split))]


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
    with suppress(OSError):  # the folder of a shard is removed if it is empty
        path.parent.rmdir()
