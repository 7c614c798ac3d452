"""What a colleague asks of a store, as one JSON-ready value: what it holds, from what, how large, how far."""

from pathlib import Path
from typing import Any

from .arrays import rows_of
from .errors import NotFoundError
from .manifest import MANIFEST
from .order import SPLITS
from .plan import Plan
from .reader import Site, Store, is_complete, open_store
from .writer import read_plan, unfinished


def describe(path: Path) -> dict[str, Any]:
    """Describe the store at `path`, finished or not; raises NotFoundError where there is none."""
    plan = read_plan(path) if path.is_dir() else None
    if is_complete(path):
        store = open_store(path)
        return _plan_facts(store.plan) | _complete_facts(store)
    if plan is None:
        raise NotFoundError(f"{path} is no gsae store: it has no {MANIFEST} and no plan.json.")
    missing = [f"{split} {window}" for split, window in unfinished(path, plan)]
    return _plan_facts(plan) | {"state": "unfinished", "missing_windows": missing}


def _plan_facts(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.model.id,
        "revision": plan.model.revision,
        "weights_sha256": plan.model.weights_sha256,
        "dtype": plan.model.dtype,
        "dataset": plan.dataset.id,
        "dataset_revision": plan.dataset.revision,
        "documents": plan.contexts.documents,
        "contexts": plan.contexts.contexts,
        "context_size": plan.context_size,
        "text_ended_early": plan.contexts.ended_early,
        "seed": plan.seed,
        "rows": {split: rows_of(plan, split) for split in SPLITS},
        "windows": {"train": plan.windows, "heldout": plan.heldout_windows},
        "window_rows": plan.window_rows,
        "chunk_rows": plan.chunk_rows,
        "codec": plan.codec,
        "level": plan.level,
        "sites": {site.name: {"d_in": site.d_in, "module": site.module} for site in plan.sites},
    }


def _complete_facts(store: Store) -> dict[str, Any]:
    sites = {site.name: _site_facts(store, store.site(site.name)) for site in store.plan.sites}
    return {"state": "complete", "digest": store.digest, "bytes": store.bytes, "moments": sites}


def _site_facts(store: Store, site: Site) -> dict[str, Any]:
    size = sum(sum(store.array_files(spec, split)) for split in SPLITS for spec in [store.array(site.spec, split)])
    raw = sum(store.site(site.name, split).raw_bytes for split in SPLITS)
    every, usual = site.moments.within(0), site.moments.within(10)
    return {
        "bytes": size,
        "ratio": size / raw,
        "mean_norm": float(every.mean @ every.mean) ** 0.5,
        "root_mean_square_norm": every.mean_square_norm**0.5,
        "median_norm": every.median_norm,
        "rows_over_10_medians": usual.skipped,
        "their_share_of_squares": 1 - usual.rows * usual.mean_square_norm / (every.rows * every.mean_square_norm),
    }
