"""The features folder of every SAE of a run: what each latent fires on, how strongly, what it says.

docs/features.md is its contract. Neither the language model nor the text is read: what needs them, texts of tokens
and effects on logits, comes in as values.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

from gsae.errors import NotFoundError, UsageError
from gsae.evaluate import Progress, Trained, common_input, sae_folders
from gsae.files import replace_text
from gsae.store import SPLITS, Site, Store, StoreSet
from gsae.train import SAE, load_sae, weights_sha256

from .directions import LogitEffects, neighbours, outermost
from .firings import Ints, joined, read_firings, write_firings
from .parquet import (
    GROUP,
    arrow,
    examples_schema,
    latents_schema,
    lists,
    ragged,
    write_contexts,
    write_vocabulary,
    writing,
)
from .portrait import Kept, Portrait, portrait

SCHEMA = 1
KEPT = Kept()
FACTS = "features.json"
Split = Literal["train", "heldout"]
Listen = Callable[[Progress], None]


@dataclass(frozen=True)
class Words:
    """What only the language model knows. texts: of every token id. effects: None where a site has none."""

    texts: Sequence[str] | None = None
    effects: LogitEffects | None = None


def find_features(
    run: Path,
    store: Store | StoreSet,
    words: Words,
    *,
    names: Sequence[str] = (),
    split: Split = "heldout",
    kept: Kept = KEPT,
    listen: Listen = lambda event: None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Describe every latent of a run's SAEs (of `names`, if given) on a split's rows; return each features.json.

    Raises NotFoundError (no SAEs, none of that name, the store lacks their site), IncompatibleError (trained from
    another store), UsageError (no rows in the split, or no pyarrow).
    """
    arrow()
    folders = {folder.name: folder for folder in sae_folders(run)}
    unknown = sorted(set(names) - set(folders))
    if unknown:
        raise NotFoundError(f"{run} has no SAE {unknown[0]!r}; it has {', '.join(folders)}.")
    chosen = {name: folder for name, folder in folders.items() if not names or name in names}
    saes = {name: load_sae(folder) for name, folder in chosen.items()}
    trained = {name: Trained.of(folder, saes[name]) for name, folder in chosen.items()}
    site_name, _, norm_limit = common_input(run, trained, store)
    site = store.site(site_name, split=split)
    if site.rows == 0:
        raise UsageError(f"{store.name} has no {split} rows to look at features on.")
    looks = [
        Look(name, weights_sha256(folder), saes[name].to(device), store, site, norm_limit, words, kept, device)
        for name, folder in chosen.items()
    ]
    return [_describe(look, run / "features" / look.name, listen) for look in looks]


@dataclass(frozen=True)
class Look:
    """One SAE, the rows it is looked at on, and what is wanted of it."""

    name: str
    weights_sha256: str
    sae: SAE
    store: Store | StoreSet
    site: Site
    norm_limit: float
    words: Words
    kept: Kept
    device: str

    def made_of(self) -> dict[str, str]:
        """What its firings follow from."""
        limit = "" if self.norm_limit == inf else repr(self.norm_limit)
        one = {"sae": self.name, "weights_sha256": self.weights_sha256, "norm_limit": limit}
        return one | {"store_digest": self.store.digest, "site": self.site.name, "split": self.site.split}


def _describe(look: Look, folder: Path, listen: Listen) -> dict[str, Any]:
    files, rows = write_firings(
        look.sae,
        look.site,
        folder / "activations",
        look.made_of(),
        look.norm_limit,
        lambda done: listen(Progress("activations", done, look.site.rows, look.name)),
        look.device,
    )
    facts = _facts(look, rows)
    if _read(folder / FACTS) == facts:
        return facts
    (folder / FACTS).unlink(missing_ok=True)  # from here on the folder is not complete
    contexts = _write_latents(look, folder, files, rows, listen)
    size = look.store.plan.context_size
    parts = np.split(contexts, range(GROUP, len(contexts), GROUP))
    tokens = ((part, look.store.tokens_around(part * size, 0, size - 1)) for part in parts)
    write_contexts(folder / "contexts.parquet", tokens)
    (folder / "vocabulary.parquet").unlink(missing_ok=True)
    if look.words.texts is not None:
        write_vocabulary(folder / "vocabulary.parquet", look.words.texts)
    text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
    replace_text(folder / FACTS, text)
    return facts


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # written again
    return found if isinstance(found, dict) else None


def _facts(look: Look, rows: int) -> dict[str, Any]:
    sae, site, plan = look.sae, look.site, look.store.plan
    return {
        "schema": SCHEMA,
        "sae": look.name,
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "weights_sha256": look.weights_sha256,
        "site": site.name,
        "module": site.spec.module,
        "hook_name": site.spec.hook_name,
        "model": plan.model.id,
        "dataset": plan.dataset.id,
        "store_digest": look.store.digest,
        "context_size": plan.context_size,
        "split": site.split,
        "rows": rows,
        "rows_skipped": site.rows - rows,
        "contexts": int((look.store.split() == SPLITS.index(site.split)).sum()),
        **asdict(look.kept),
        "has_tokens": look.words.texts is not None,
        "has_logits": look.words.effects is not None,
    }


def _write_latents(look: Look, folder: Path, files: Sequence[Path], rows: int, listen: Listen) -> Ints:
    """Write latents.parquet and examples.parquet; return the contexts that examples stand in, ascending."""
    pa, _ = arrow()
    sae, context_size, seen = look.sae, look.store.plan.context_size, set[int]()
    W_dec = nn.functional.normalize(sae.params.W_dec, dim=1)
    with (
        writing(folder / "latents.parquet", latents_schema()) as latents,
        writing(folder / "examples.parquet", examples_schema()) as examples,
    ):
        for first in range(0, sae.d_sae, GROUP):
            last = min(first + GROUP, sae.d_sae)
            portraits = [
                portrait(latent, sources, values, context_size, look.kept) if len(values) else None
                for firings in read_firings(files, first, last)
                for latent, sources, values in firings
            ]
            columns = _figures(portraits, first, rows, look.store) | _said(look, W_dec, first, last)
            latents.write_table(pa.table(columns, schema=latents_schema()))
            shown = _examples(portraits, first, context_size)
            examples.write_table(pa.table(shown, schema=examples_schema()))
            seen.update(np.unique(shown["context"]).tolist())
            listen(Progress("latents", last, sae.d_sae, look.name))
    return np.array(sorted(seen), np.int64)


def _figures(portraits: Sequence[Portrait | None], first: int, rows: int, store: Store | StoreSet) -> dict[str, Any]:
    """Return the columns of latents.parquet that follow from firings."""
    pa, _ = arrow()
    firing = [0 if p is None else p.rows for p in portraits]
    tops = np.array([p.top_source for p in portraits if p is not None], np.int64)
    tokens = iter(store.tokens_around(tops, 0, 0)[:, 0].tolist() if len(tops) else ())
    return {
        "latent": np.arange(first, first + len(portraits), dtype=np.int32),
        "rows": firing,
        "density": [n / rows if rows else 0.0 for n in firing],
        "max": [p and p.max for p in portraits],
        "mean": [p and p.mean for p in portraits],
        "histogram": lists([None if p is None else p.histogram for p in portraits], pa.int64()),
        "quantile_edges": lists([None if p is None else p.quantile_edges for p in portraits], pa.float32()),
        "top_token": [p and next(tokens) for p in portraits],
    }


def _said(look: Look, unit: Tensor, first: int, last: int) -> dict[str, Any]:
    """Return the columns of latents.parquet that follow from decoder rows; unit: (d_sae, d_in), of length 1."""
    pa, _ = arrow()
    near, cosines = neighbours(unit, first, last, look.kept.neighbours)
    columns: dict[str, Any] = {"neighbours": _rows(near, "int32"), "cosines": _rows(cosines, "float32")}
    names = ("promoted", "suppressed")
    if look.words.effects is None:
        nothing: list[NDArray[Any] | None] = [None] * (last - first)
        for column in names:
            columns |= {column: lists(nothing, pa.int32()), f"{column}_logits": lists(nothing, pa.float32())}
        return columns
    effects = look.words.effects(look.sae.params.W_dec[first:last])
    for column, (ids, logits) in zip(names, outermost(effects, look.kept.logits), strict=True):
        columns |= {column: _rows(ids, "int32"), f"{column}_logits": _rows(logits, "float32")}
    return columns


def _rows(values: Tensor, kind: str) -> Any:
    pa, _ = arrow()
    return lists(list(values.numpy()), getattr(pa, kind)())


def _examples(portraits: Sequence[Portrait | None], first: int, context_size: int) -> dict[str, Any]:
    """Return the columns of examples.parquet."""
    pa, _ = arrow()
    found = [(first + i, p.examples) for i, p in enumerate(portraits) if p is not None]

    def column(name: str, dtype: DTypeLike = np.int64) -> NDArray[Any]:
        return joined((getattr(examples, name) for _, examples in found), dtype)

    source, quantile, lengths = column("source"), column("quantile", np.int8), column("lengths")
    sampled = quantile >= 0
    return {
        "latent": np.repeat([latent for latent, _ in found], [len(e.source) for _, e in found]).astype(np.int32),
        "kind": pa.array(["top", "sample"]).take(pa.array(sampled.astype(np.int8))),
        "quantile": pa.array(quantile, mask=~sampled),
        "rank": column("rank", np.int16),
        "context": source // context_size,
        "position": (source % context_size).astype(np.int32),
        "value": column("value", np.float32),
        "positions": ragged(lengths, column("positions"), pa.int32()),
        "values": ragged(lengths, column("values", np.float32), pa.float32()),
    }
