"""A description of a store as one JSON-ready value: its content, origin, size and state.

It needs only the plan and the manifest, two small files. Norms are known by bins of an eighth of an octave of
||x||^2: a percentile is the root mean square of the norms in its bin, within 4.4 % of the exact one.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from gsae.errors import NotFoundError
from gsae.store.format.arrays import split_rows, window_arrays
from gsae.store.format.json_files import parse
from gsae.store.format.manifest import MANIFEST, PLAN, all_windows
from gsae.store.format.moments import Moments
from gsae.store.format.plan import ContextsSpec, ModelSource, Plan
from gsae.store.format.row_order import SPLITS
from gsae.store.places.pending_tokens import TOKENS_ONLY, UNFINISHED_TOKENS, read_tokens
from gsae.store.places.place import Place, place_at
from gsae.store.read.site import Site
from gsae.store.read.store import Store, open_store, recorded

from .nonfinite_rows import nonfinite_rows

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 99.9)
LARGEST_SHARE = 0.001
WEIGHTS_FACTS = {"base", "adapter_sha256", "code", "quantization"}


def describe(path: str | Path) -> dict[str, Any]:
    """Describe the store in a folder or at a URL, finished or not. Raises NotFoundError if there is no store."""
    where = place_at(path)
    files = where.children("")[1]
    if MANIFEST in files:
        store = open_store(path)
        return _plan_facts(store.plan) | _complete_facts(store)
    if PLAN not in files:
        return _tokens_facts(where)
    plan = parse(Plan, where.read(PLAN), f"{where.name}/{PLAN}")
    return _plan_facts(plan) | _unfinished_facts(plan, set(recorded(where, plan)))


def _tokens_facts(where: Place) -> dict[str, Any]:
    """Describe a store without a plan."""
    plan, made = read_tokens(where)
    if plan is None:
        raise NotFoundError(f"{where.name} is no gsae store: it has no {MANIFEST} and no {PLAN}.")
    facts: dict[str, Any] = {
        "state": TOKENS_ONLY if made else UNFINISHED_TOKENS,
        "tokenizer": plan.tokenizer.id,
        "dataset": plan.dataset.id,
        "dataset_revision": plan.dataset.revision,
        "dataset_split": plan.dataset.split,
        "context_size": plan.context_size,
        "requested_rows": plan.requested_rows,
        "seed": plan.seed,
        "schema_version": plan.schema_version,
    }
    if made:
        facts |= {
            "documents": made.contexts.documents,
            **_bad_rows(made.contexts),
            "contexts": made.contexts.contexts,
            "text_ended_early": made.contexts.ended_early,
            "tokens_sha256": made.contexts.tokens_sha256,
            "rows": {"train": made.rows, "heldout": made.heldout_rows},
        }
    return facts


def _plan_facts(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.model.id,
        "revision": plan.model.revision,
        "weights_sha256": plan.model.weights_sha256,
        **_weights_facts(plan.model),
        "dtype": plan.model.dtype,
        "attn_implementation": plan.model.attn_implementation,
        "accelerator": plan.model.accelerator,
        "tokenizer": plan.tokenizer.id,
        "dataset": plan.dataset.id,
        "dataset_revision": plan.dataset.revision,
        "dataset_split": plan.dataset.split,
        "documents": plan.contexts.documents,
        **_bad_rows(plan.contexts),
        "contexts": plan.contexts.contexts,
        "context_size": plan.context_size,
        "text_ended_early": plan.contexts.ended_early,
        "seed": plan.seed,
        "rows": {split: split_rows(plan, split) for split in SPLITS},
        "windows": {"train": plan.windows, "heldout": plan.heldout_windows},
        "window_rows": plan.window_rows,
        "chunk_rows": plan.chunk_rows,
        "codec": plan.codec,
        "level": plan.level,
        "schema_version": plan.schema_version,
        "sites": {s.name: {"d_in": s.d_in, "module": s.module, "hook_name": s.hook_name} for s in plan.sites},
    }


def _bad_rows(contexts: ContextsSpec) -> dict[str, Any]:
    """Return the rows of the text that were left out, if there were any."""
    return contexts.model_dump(mode="json", include={"bad_rows"})


def _weights_facts(model: ModelSource) -> dict[str, Any]:
    """Return how the weights came, as far as the plan records more than their hash."""
    return model.model_dump(mode="json", include=WEIGHTS_FACTS)


def _unfinished_facts(plan: Plan, finished: set[Any]) -> dict[str, Any]:
    """Return the missing windows and the rows of the finished ones."""
    rows = {split: window_arrays(plan, split)[0].rows_of_shard for split in SPLITS}
    return {
        "state": "unfinished",
        "finished_rows": {split: sum(rows[split](w) for s, w in finished if s == split) for split in SPLITS},
        **_missing(plan, finished),
    }


def _missing(plan: Plan, finished: set[Any]) -> dict[str, Any]:
    """Return the missing windows; consecutive ones are one item: `train 3 to 17`."""
    missing = [window for window in all_windows(plan) if window not in finished]
    runs = []
    for (split, _), run in itertools.groupby(enumerate(missing), lambda at: (at[1][0], at[1][1] - at[0])):
        numbers = [window for _, (_, window) in run]
        runs.append(f"{split} {numbers[0]}" + (f" to {numbers[-1]}" if len(numbers) > 1 else ""))
    return {"missing_windows": runs}


def _complete_facts(store: Store) -> dict[str, Any]:
    finished = {(split, window) for split in SPLITS for window in store.windows(split)}
    parent = {"parent": store.plan.parent} if store.plan.parent else {}
    nonfinite = nonfinite_rows(store)
    return {
        "state": "sealed" if store.sealed else "complete",
        **(_missing(store.plan, finished) if store.sealed else {}),
        "rows": {split: store.site(store.plan.sites[0].name, split).rows for split in SPLITS},
        **({"nonfinite_rows": nonfinite} if nonfinite else {}),
        "digest": store.digest,
        "files_digest": store.manifest.files_digest,
        **parent,
        "bytes": store.bytes,
        "moments": {site.name: _site_facts(store, store.site(site.name)) for site in store.plan.sites},
    }


def _site_facts(store: Store, site: Site) -> dict[str, Any]:
    """Return the size of a site in both splits, and the norms of its train rows."""
    size = sum(sum(store.file_sizes(store.array(site.spec, split), split)) for split in SPLITS)
    raw = sum(store.site(site.name, split).raw_bytes for split in SPLITS)
    every, usual = site.moments.within(0), site.moments.within(10)
    total = every.rows * every.mean_square_norm
    return {
        "bytes": size,
        "ratio": size / raw,
        "non_finite_rows": site.moments.non_finite,
        "norm_of_mean": float(np.linalg.norm(every.mean)),
        "root_mean_square_norm": every.mean_square_norm**0.5,
        "median_norm": every.median_norm,
        **norm_facts(site.moments),
        "rows_over_10_medians": usual.skipped,
        "their_share_of_squares": 1 - usual.rows * usual.mean_square_norm / total if total else 0.0,
    }


def norm_facts(moments: Moments) -> dict[str, Any]:
    """Return the distribution of ||x|| over the finite rows; {} if there are none.

    mean_norm is within 0.1 %, percentiles (nearest rank) and the largest norm within 4.4 %. largest_share_of_squares is
    the share of the sum of ||x||^2 that the largest 0.1 % of rows have; rows of the last bin count with its mean.
    """
    if not moments.rows:
        return {}
    counts, squares = moments.counts, moments.squares.sum(axis=1)
    norms, below = np.sqrt(squares / counts), np.cumsum(counts)
    ranks = {f"{p:g}": -(-int(p * 10) * moments.rows // 1000) for p in PERCENTILES}
    above = np.minimum(np.cumsum(counts[::-1]), -(-moments.rows // round(1 / LARGEST_SHARE)))[::-1]
    taken = -np.diff(np.append(above, 0))  # how many of the largest rows are in each bin
    total = float(squares.sum())
    return {
        "mean_norm": float((counts * norms).sum() / moments.rows),
        "norm_percentiles": {name: float(norms[np.searchsorted(below, rank)]) for name, rank in ranks.items()},
        "largest_norm": float(norms[-1]),
        "largest_share_of_rows": LARGEST_SHARE,
        "largest_share_of_squares": float((taken * squares / counts).sum()) / total if total else 0.0,
    }
