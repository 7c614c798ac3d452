"""What an SAE's latents fire on as delphi's latent cache, which explains and scores them.

delphi caches each module's features above 0 in files of a range of latents: `locations` (n, 3), a row (context,
position, latent less the range's first), by context and position; their `activations`; and the `tokens` of all
contexts, which every file repeats. Its loader takes whatever stands in a module's folder, and only with a
config.json, so that is written last. The latents' ranges follow from how often they fire: a file's entries fit in
memory.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save_file

from gsae.errors import CorruptError, IncompatibleError
from gsae.evaluate import Progress
from gsae.features.find.firings import Ints, read_firings
from gsae.features.find.reader import activation_files, read_facts, rows_fired
from gsae.files import replace_file, replace_text
from gsae.store import SPLITS, Store, StoreSet

CONFIG = "config.json"
FILE_ENTRIES = 1 << 23  # of a file, but for a single latent that has more: 80 MB of locations and activations
Ranges = list[tuple[int, int]]


def to_delphi(
    features: Path, store: Store | StoreSet, out: Path, listen: Callable[[Progress], None] = lambda event: None
) -> Path:
    """Write RUN/features/NAME as OUT/latents/MODULE of delphi's, `store` being what it was made on; return that folder.

    A stopped export goes on at the first file that is missing. Raises NotFoundError (no features, or no activations),
    IncompatibleError (another store, a newer schema, or `out` holds something else) and CorruptError.
    """
    facts = read_facts(features)
    if store.digest != facts["store_digest"]:
        raise IncompatibleError(f"{features} was made on another store than {store.name}; give that with --store.")
    counts, files = rows_fired(features), activation_files(features, facts)
    ranges = _ranges(counts)
    folder = _folder(out, facts)
    _refuse_others(folder, ranges, facts)
    contexts = np.flatnonzero(store.split() == SPLITS.index(facts["split"]))
    tokens = store.tokens()[contexts]
    for first, last in ranges:
        path = folder / _name(first, last)
        if not path.exists():
            tensors = _entries(files, first, last, counts[first:last], contexts, facts["context_size"])
            tensors |= {"tokens": tokens, "contexts": contexts}
            replace_file(path, partial(save_file, tensors, metadata=_metadata(facts)))
        listen(Progress("export", last, len(counts), facts["sae"]))
    text = json.dumps(_config(facts, len(contexts), len(ranges)), indent=4) + "\n"
    replace_text(folder / CONFIG, text)
    return folder


def _folder(out: Path, facts: dict[str, Any]) -> Path:
    """Make the module's folder; its name is data from elsewhere."""
    module = str(facts["module"])
    if not re.fullmatch(r"\w[\w.-]*", module, re.ASCII):
        raise CorruptError(f"features.json has {module!r} for a module, which is no name of a folder.")
    folder = out / "latents" / module
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise IncompatibleError(f"{folder} is a file, or below one; an export needs a folder of its own.") from None
    return folder


def _refuse_others(folder: Path, ranges: Ranges, facts: dict[str, Any]) -> None:
    """Raise IncompatibleError for a file that this export does not write: delphi's loader would take it for a part."""
    names = {_name(first, last) for first, last in ranges}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (path.name == CONFIG and _is_ours(path, facts)):
            continue
        if path.name not in names or _made_of(path) != _metadata(facts):
            raise IncompatibleError(f"{path} is not of this export; choose another folder or delete {folder}.")


def _is_ours(config: Path, facts: dict[str, Any]) -> bool:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("gsae") == facts


def _made_of(file: Path) -> dict[str, str] | None:
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            return dict(opened.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return None


def _metadata(facts: dict[str, Any]) -> dict[str, str]:
    return {"gsae": json.dumps(facts, sort_keys=True)}


def _name(first: int, last: int) -> str:
    return f"{first}_{last - 1}.safetensors"


def _ranges(counts: Ints) -> Ranges:
    """Cut latents of `counts` (d_sae,) entries into ranges of at most FILE_ENTRIES, or of one latent."""
    ranges, first = [], 0
    while first < len(counts):
        fitting = int(np.searchsorted(np.cumsum(counts[first:]), FILE_ENTRIES, side="right"))
        ranges.append((first, first + max(fitting, 1)))
        first = ranges[-1][1]
    return ranges


def _entries(
    files: list[Path], first: int, last: int, counts: Ints, contexts: Ints, context_size: int
) -> dict[str, NDArray[Any]]:
    """Return the locations and activations of a range of latents, by context, position and latent."""
    parts = list(read_firings(files, first, last))
    found = np.concatenate([np.diff(part.indptr) for part in parts])
    if not np.array_equal(found, counts):
        raise CorruptError(
            f"{files[0].parent} is not whole: latents.parquet has other counts. Run `gsae features` again."
        )
    sources = np.concatenate([part.sources for part in parts])
    values = np.concatenate([part.values for part in parts])
    latents = np.repeat(np.arange(last - first), counts)
    order = np.argsort(sources, kind="stable")  # they are by latent
    context, position = np.divmod(sources[order], context_size)
    number = np.searchsorted(contexts, context)
    locations = np.stack([number, position, latents[order]], axis=1)
    kind = np.uint16 if locations.max(initial=0) < 1 << 16 else np.uint32  # as delphi chooses
    return {"locations": locations.astype(kind), "activations": values[order]}


def _config(facts: dict[str, Any], contexts: int, splits: int) -> dict[str, Any]:
    """What delphi notes of a cache, as far as it is known, and where it is from."""
    known = {"dataset_repo": facts["dataset"], "dataset_split": facts["split"], "model_name": facts["model"]}
    size = {"cache_ctx_len": facts["context_size"], "ctx_len": facts["context_size"]}  # newer and older name
    return known | size | {"n_tokens": contexts * facts["context_size"], "n_splits": splits, "gsae": facts}
