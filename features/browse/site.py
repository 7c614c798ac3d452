"""The feature browser of a run as static files: one page, its scripts, and data in shards that it loads on demand.

    index.html, app.css, *.js             as they are in page
    data/index.json                       the SAEs and what they were applied to
    data/<n>/table.json                   SAE n: the columns of the table of latents
    data/<n>/latents/00000.json           SAE n: all that the pages of LATENTS_A_SHARD latents show
    data/contexts/<store>/00000.json      tokens of contexts, CONTEXT_TOKENS a file, for all SAEs of a store
    data/vocabularies/<k>.json            texts of tokens

The file of a context follows from its number, so no index of contexts is needed. SAEs of one store share these files,
and a page reads the few that its examples stand in. Equal features give equal bytes.
"""

import hashlib
import heapq
import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from gsae.errors import CorruptError, NotFoundError
from gsae.evaluate import Listen, Progress, ignore, public_name
from gsae.features.find.features_json import FACTS, FeatureFacts, read_facts
from gsae.features.find.latents_json import in_batches, read_contexts, read_latents, read_texts
from gsae.features.find.parquet import arrow

from .folder import INDEX, SCHEMA, digest_of, make_folder, write_json

LATENTS_A_SHARD = 32
CONTEXT_TOKENS = 8192  # in a file of contexts
SHOWN = (  # of features.json
    *("sae", "architecture", "d_in", "d_sae", "site", "hook_name", "model", "dataset", "store_digest"),
    *("weights_sha256", "context_size", "split", "rows", "contexts", "has_tokens", "has_logits"),
)
COLUMNS = ("rows", "max", "mean", "top_token")  # of the table


def build_browser(run: Path, names: Sequence[str] = (), out: Path | None = None, listen: Listen = ignore) -> Path:
    """Write the browser of a run's SAEs (of `names`, if given) to `out`, RUN/browser if None; return the folder.

    A browser that was made from the same features is left as it is. Raises NotFoundError (no features, or none of that
    name), CorruptError, IncompatibleError (features of a newer gsae) and UsageError (`out` holds something else, or
    pyarrow is not installed).
    """
    arrow()
    out = out or run / "browser"
    folders = feature_folders(run, names)
    facts = [read_facts(folder) for folder in folders]
    digest = digest_of([one.values() for one in facts])
    make_folder(out, digest, lambda folder: _fill(folder, folders, facts, digest, listen))
    return out


def feature_folders(run: Path, names: Sequence[str] = ()) -> list[Path]:
    """Return the complete features folders of a run; of `names` in their order, if given."""
    complete = sorted(path.parent for path in (run / "features").glob(f"*/{FACTS}"))
    if not complete:
        raise NotFoundError(f"{run} has no features. Run `gsae features {run}` first.")
    by_name = {folder.name: folder for folder in complete}
    for name in names:
        if name not in by_name:
            raise NotFoundError(f"{run} has no features of an SAE {name!r}. It has those of {', '.join(by_name)}.")
    return [by_name[name] for name in dict.fromkeys(names)] if names else complete


def write_texts(out: Path, folders: Sequence[Path], facts: Sequence[FeatureFacts]) -> list[int | None]:
    """Write each different vocabulary once; return the number of each SAE's, None for an SAE without texts."""
    numbers: dict[str, int] = {}
    found: list[int | None] = []
    for folder, one in zip(folders, facts, strict=True):
        if not one.has_tokens:
            found.append(None)
            continue
        texts = read_texts(folder / "vocabulary.parquet")
        key = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        found.append(numbers.setdefault(key, len(numbers)))
        write_json(out / "data" / "vocabularies" / f"{found[-1]}.json", texts)
    return found


def _fill(out: Path, folders: Sequence[Path], facts: Sequence[FeatureFacts], digest: str, listen: Listen) -> None:
    """Write the data of a browser of all latents, the index last."""
    texts = write_texts(out, folders, facts)
    stores = _write_contexts(out, folders, facts)
    saes = []
    for n, (folder, one) in enumerate(zip(folders, facts, strict=True)):
        _write_sae(out / "data" / str(n), folder, one, listen)
        saes.append(_shown(one) | {"contexts_from": stores[n], "vocabulary": texts[n]})
    index = {"schema": SCHEMA, "made_of": digest, "latents_a_shard": LATENTS_A_SHARD, "blind": None, "saes": saes}
    write_json(out / INDEX, index)


def _shown(facts: FeatureFacts) -> dict[str, Any]:
    """Return what the page shows of features.json; absolute paths are cut to their last part."""
    shown = {key: getattr(facts, key) for key in SHOWN}
    return shown | {key: public_name(shown[key]) for key in ("model", "dataset")}


def _write_sae(out: Path, source: Path, facts: FeatureFacts, listen: Listen) -> None:
    """Write an SAE's table and the shards of its latents."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    total, done = facts.d_sae, 0
    for number, latents in enumerate(in_batches(read_latents(source), LATENTS_A_SHARD)):
        if [latent["latent"] for latent in latents] != list(range(done, done + len(latents))):
            raise CorruptError(f"{source} lacks latents. Delete it and run `gsae features` again.")
        done += len(latents)
        for name, column in columns.items():
            column += [latent[name] for latent in latents]
        write_json(out / "latents" / f"{number:05d}.json", latents)
        listen(Progress("latents", done, total, facts.sae))
    if done != total:
        raise CorruptError(f"{source} has {done:,} latents of {total:,}. Delete it and run `gsae features` again.")
    write_json(out / "table.json", columns)


def _write_contexts(out: Path, folders: Sequence[Path], facts: Sequence[FeatureFacts]) -> list[dict[str, int]]:
    """Write the contexts of each store once; return for each SAE the number of its store and how many a file holds."""
    keys = [(one.store_digest, one.context_size) for one in facts]
    stores = list(dict.fromkeys(keys))
    each = [max(1, CONTEXT_TOKENS // size) for _, size in stores]
    for store, key in enumerate(stores):
        paths = [folder / "contexts.parquet" for folder, its in zip(folders, keys, strict=True) if its == key]
        _write_store(out / "data" / "contexts" / str(store), paths, each[store])
    return [{"store": stores.index(key), "contexts_a_shard": each[stores.index(key)]} for key in keys]


def _write_store(out: Path, paths: Sequence[Path], each: int) -> None:
    """Write the contexts of one store, `each` numbers a file."""
    for number, contexts in groupby(_merged(paths), lambda found: found[0] // each):
        write_json(out / f"{number:05d}.json", dict(contexts))


def _merged(paths: Sequence[Path]) -> Iterator[tuple[int, list[int]]]:
    """Yield each context of any of the files once, in order; raises CorruptError where two differ in its tokens."""
    last: tuple[int, list[int]] | None = None
    for found in heapq.merge(*map(read_contexts, paths), key=lambda context: context[0]):
        if last is not None and found[0] == last[0]:
            if found[1] != last[1]:
                where = os.path.commonpath(paths)
                raise CorruptError(f"Files below {where} differ in context {found[0]}. Run `gsae features` again.")
            continue
        yield found
        last = found
