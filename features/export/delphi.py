"""What an SAE's latents fire on, as a latent cache of delphi, which explains latents and scores the explanations.

delphi caches the features above 0 of a module in files, each for a range of latents. A file holds `locations` (n, 3),
rows of (context, position, latent minus the first of the range) by context and position, their `activations`, and the
`tokens` of all contexts, which every file repeats. Its loader reads everything in a module's folder, but only with a
config.json, which is therefore written last. The ranges are chosen so that the entries of one file fit in memory.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from gsae.errors import CorruptError, IncompatibleError
from gsae.evaluate import Listen, Progress, ignore
from gsae.features.find.features_json import FeatureFacts, read_facts
from gsae.features.find.firings import Ints, cut_ranges, read_firings
from gsae.features.find.reader import activation_files, rows_fired
from gsae.features.find.stamp import read_stamp, stamp
from gsae.files import replace_file, replace_text
from gsae.store import SPLITS, Store, StoreSet

from .folder import make_export_folder, not_of_this_export
from .source import ExportSource

CONFIG = "config.json"
FILE_ENTRIES = 1 << 23  # of a file, unless a single latent has more: 80 MB of locations and activations
Ranges = list[tuple[int, int]]


def export(source: ExportSource, out: Path, listen: Listen) -> Path:
    """Export an SAE's features below the folder `out`; return the folder of its module."""
    return to_delphi(source.features, source.open_store(), out, listen)


def to_delphi(features: Path, store: Store | StoreSet, out: Path, listen: Listen = ignore) -> Path:
    """Write RUN/features/NAME as OUT/latents/MODULE; return that folder. store: the one the features were found on.

    A stopped export continues with the first file that is missing. Raises NotFoundError (no features, or no
    activations), IncompatibleError (another store, a newer schema, or `out` holds something else) and CorruptError.
    """
    facts = read_facts(features)
    if store.digest != facts.store_digest:
        raise IncompatibleError(f"{features} was made on another store than {store.name}. Give that one with --store.")
    counts, files = rows_fired(features), activation_files(features, facts)
    ranges = list(cut_ranges(counts, FILE_ENTRIES))
    folder = make_export_folder(out / "latents" / _module(facts))
    _refuse_others(folder, ranges, facts)
    contexts = np.flatnonzero(store.split() == SPLITS.index(facts.split))
    tokens = store.tokens()[contexts]
    for first, last in ranges:
        path = folder / _name(first, last)
        if not path.exists():
            tensors = _entries(files, first, last, counts[first:last], contexts, facts.context_size)
            tensors |= {"tokens": tokens, "contexts": contexts}
            replace_file(path, partial(save_file, tensors, metadata=stamp(facts.values())))
        listen(Progress("export", last, len(counts), facts.sae))
    replace_text(folder / CONFIG, json.dumps(_config(facts, len(contexts), len(ranges)), indent=4) + "\n")
    return folder


def _module(facts: FeatureFacts) -> str:
    """Return the module's name, after checking that it names a folder: it is data from elsewhere."""
    if not re.fullmatch(r"\w[\w.-]*", facts.module, re.ASCII):
        raise CorruptError(f"features.json has the module {facts.module!r}, which is no name of a folder.")
    return facts.module


def _refuse_others(folder: Path, ranges: Ranges, facts: FeatureFacts) -> None:
    """Raise IncompatibleError for a file that this export does not write: delphi's loader would read it too."""
    names = {_name(first, last) for first, last in ranges}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (path.name == CONFIG and _is_ours(path, facts)):
            continue
        if path.name not in names or read_stamp(path) != stamp(facts.values()):
            raise not_of_this_export(path)


def _is_ours(config: Path, facts: FeatureFacts) -> bool:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("gsae") == facts.values()


def _name(first: int, last: int) -> str:
    return f"{first}_{last - 1}.safetensors"


def _entries(
    files: list[Path], first: int, last: int, counts: Ints, contexts: Ints, context_size: int
) -> dict[str, NDArray[Any]]:
    """Return the locations and activations of a range of latents, by context, position and latent."""
    parts = list(read_firings(files, first, last))
    found = np.concatenate([np.diff(part.indptr) for part in parts])
    if not np.array_equal(found, counts):
        raise CorruptError(
            f"{files[0].parent} is incomplete: latents.parquet has other counts. Run `gsae features` again."
        )
    sources = np.concatenate([part.sources for part in parts])
    values = np.concatenate([part.values for part in parts])
    latents = np.repeat(np.arange(last - first), counts)
    order = np.argsort(sources, kind="stable")  # the firings are by latent
    context, position = np.divmod(sources[order], context_size)
    number = np.searchsorted(contexts, context)
    locations = np.stack([number, position, latents[order]], axis=1)
    kind = np.uint16 if locations.max(initial=0) < 1 << 16 else np.uint32  # as delphi chooses
    return {"locations": locations.astype(kind), "activations": values[order]}


def _config(facts: FeatureFacts, contexts: int, files: int) -> dict[str, Any]:
    """Return what delphi notes of a cache, as far as it is known, and features.json."""
    return {
        "dataset_repo": facts.dataset,
        "dataset_split": facts.split,
        "model_name": facts.model,
        "cache_ctx_len": facts.context_size,
        "ctx_len": facts.context_size,  # the older name of the line before
        "n_tokens": contexts * facts.context_size,
        "n_splits": files,
        "gsae": facts.values(),
    }
