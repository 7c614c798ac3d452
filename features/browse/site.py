"""The feature browser of a run as static files: one page, its scripts, and data in shards that it loads on demand.

    index.html, app.css, *.js             as they are in page
    data/index.json                       the SAEs and what they were applied to
    data/<n>/table.json                   SAE n: the columns of the table of latents
    data/<n>/latents/00000.json           SAE n: all that the pages of LATENTS_A_SHARD latents show
    data/contexts/<store>/00000.json      tokens of contexts, CONTEXT_TOKENS a file, for all SAEs of a store
    data/vocabularies/<k>.json            texts of tokens

A context's file follows from its number, so nothing looks it up; SAEs of one store share files, and a page reads the
few that its examples stand in. The folder appears whole or not at all, and equal features give equal bytes.
"""

import hashlib
import heapq
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from gsae.errors import CorruptError, NotFoundError, UsageError
from gsae.evaluate import Progress
from gsae.features.find.find_features import FACTS
from gsae.features.find.latents_json import in_batches, read_contexts, read_latents, read_texts
from gsae.features.find.parquet import arrow
from gsae.features.find.reader import public, read_facts
from gsae.files import alone, disk_errors, replace_folder, sweep

SCHEMA = 1
INDEX = "data/index.json"
LATENTS_A_SHARD = 32
CONTEXT_TOKENS = 8192  # in a file of contexts
SHOWN = (  # of features.json
    *("sae", "architecture", "d_in", "d_sae", "site", "hook_name", "model", "dataset", "store_digest"),
    *("weights_sha256", "context_size", "split", "rows", "contexts", "has_tokens", "has_logits"),
)
COLUMNS = ("rows", "max", "mean", "top_token")  # of the table
Listen = Callable[[Progress], None]


def build_browser(
    run: Path, names: Sequence[str] = (), out: Path | None = None, listen: Listen = lambda event: None
) -> Path:
    """Write the browser of a run's SAEs (of `names`, if given) to `out`, RUN/browser if None; return the folder.

    One that was made from the same features is left as it is. Raises NotFoundError (no features, none of that name),
    CorruptError, IncompatibleError (features of a newer gsae), UsageError (`out` is no browser, or no pyarrow).
    """
    arrow()
    out = out or run / "browser"
    folders = feature_folders(run, names)
    facts = [read_facts(folder) for folder in folders]
    digest = digest_of(facts)
    index = {"schema": SCHEMA, "made_of": digest, "latents_a_shard": LATENTS_A_SHARD, "blind": None}

    def fill(folder: Path) -> None:
        texts = write_texts(folder, folders, facts)
        stores = _write_contexts(folder, folders, facts)
        saes = []
        for n, (source, one) in enumerate(zip(folders, facts, strict=True)):
            _write_sae(folder / "data" / str(n), source, one, listen)
            saes.append(shown_facts(one) | {"contexts_from": stores[n], "vocabulary": texts[n]})
        write_json(folder / INDEX, index | {"saes": saes})

    publish(out, digest, fill)
    return out


def feature_folders(run: Path, names: Sequence[str] = ()) -> list[Path]:
    """Return the complete features folders of a run, of `names` in their order if given."""
    whole = sorted(path.parent for path in (run / "features").glob(f"*/{FACTS}"))
    if not whole:
        raise NotFoundError(f"{run} has no features. Run `gsae features {run}` first.")
    by_name = {folder.name: folder for folder in whole}
    for name in names:
        if name not in by_name:
            raise NotFoundError(f"{run} has no features of an SAE {name!r}; it has those of {', '.join(by_name)}.")
    return [by_name[name] for name in dict.fromkeys(names)] if names else whole


def made_of(out: Path) -> str | None:
    """Return what a browser that is already there was made of; None where there is none that is whole."""
    try:
        found = json.loads((out / INDEX).read_text(encoding="utf-8"))
        return str(found["made_of"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shown_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what the page shows of features.json; of absolute paths only the last part, as others may see it."""
    shown = {key: facts.get(key) for key in SHOWN}
    return shown | {key: public(str(shown[key])) for key in ("model", "dataset")}


def publish(out: Path, digest: str, fill: Callable[[Path], None]) -> None:
    """Let `fill` make a browser's files, beside a copy of the page, in a folder that then takes the place of `out`.

    One that was made of the same (`digest`) is left. Another process that is at it is waited for. Raises UsageError
    where `out` holds anything but a browser, SpaceError on a full disk.
    """

    def fill_beside_page(folder: Path) -> None:
        shutil.copytree(Path(str(resources.files(__package__) / "page")), folder)
        fill(folder)

    with disk_errors(out):
        try:
            with alone(out.parent, f"making-{out.name}"):
                if made_of(out) != digest:
                    _refuse_others(out)
                    replace_folder(out, fill_beside_page)
        finally:
            sweep(out.parent)


def _refuse_others(out: Path) -> None:
    if out.exists() and made_of(out) is None and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not a feature browser. Give another --out, or remove it.")


def write_json(path: Path, value: Any) -> None:
    """Write compact JSON in ASCII."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, allow_nan=False, separators=(",", ":")), encoding="ascii")


def write_texts(out: Path, folders: Sequence[Path], facts: Sequence[dict[str, Any]]) -> list[int | None]:
    """Write the vocabularies that differ; return which is each SAE's, None for an SAE without texts."""
    numbers: dict[str, int] = {}
    found: list[int | None] = []
    for folder, one in zip(folders, facts, strict=True):
        if not one["has_tokens"]:
            found.append(None)
            continue
        text = json.dumps(read_texts(folder / "vocabulary.parquet"), separators=(",", ":"))
        number = numbers.setdefault(hashlib.sha256(text.encode()).hexdigest(), len(numbers))
        target = out / "data" / "vocabularies" / f"{number}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="ascii")
        found.append(number)
    return found


def digest_of(values: Sequence[dict[str, Any]]) -> str:
    """Return a digest of what a browser's bytes follow from: `values`, telling the features, and the page itself."""
    digest = hashlib.sha256(json.dumps([SCHEMA, version("gsae"), *values], sort_keys=True).encode())
    page = Path(str(resources.files(__package__) / "page"))
    for path in sorted(page.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _write_sae(out: Path, source: Path, facts: dict[str, Any], listen: Listen) -> None:
    """Write an SAE's table and the shards of its latents."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    total, done = facts["d_sae"], 0
    for number, latents in enumerate(in_batches(read_latents(source), LATENTS_A_SHARD)):
        if [latent["latent"] for latent in latents] != list(range(done, done + len(latents))):
            raise CorruptError(f"{source} lacks latents. Delete it and run `gsae features` again.")
        done += len(latents)
        for name, column in columns.items():
            column += [latent[name] for latent in latents]
        write_json(out / "latents" / f"{number:05d}.json", latents)
        listen(Progress("latents", done, total, facts["sae"]))
    if done != total:
        raise CorruptError(f"{source} has {done:,} latents of {total:,}. Delete it and run `gsae features` again.")
    write_json(out / "table.json", columns)


def _write_contexts(out: Path, folders: Sequence[Path], facts: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """Write the contexts of each store once; return for each SAE whose they are and how many a file holds."""
    keys = [(one["store_digest"], one["context_size"]) for one in facts]
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
