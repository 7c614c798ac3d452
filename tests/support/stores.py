"""Small real stores of known rows, made by the real writer, for tests that need no language model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gsae.store import ContextsSpec, DatasetSource, ModelSource, Plan, SiteSpec, Store, TokenizerSource, open_store
from gsae.store.format import row_order as order
from gsae.store.format.json_files import SCHEMA_VERSION
from gsae.store.format.manifest import all_windows
from gsae.store.format.plan import chunk_rows
from gsae.store.write.contexts_writer import write_contexts
from gsae.store.write.window_writer import write_manifest, write_plan, write_window

BOS, EOS = 1, 2
NOBODY = "0" * 64
Rows = Callable[[int, int], NDArray[Any]]


def normal_rows(rows: int, d_in: int) -> NDArray[Any]:
    """Return bfloat16 rows with channels of differing scale and a mean."""
    rng = np.random.default_rng(7)
    scale = np.exp(rng.standard_normal(d_in))
    return (rng.standard_normal((rows, d_in)) * scale + 0.3 * scale).astype(ml_dtypes.bfloat16)


def sparse_rows(rows: int, d_in: int, features: int = 64, l0: float = 4.0) -> NDArray[Any]:
    """Return bfloat16 sums of a few positive multiples of known unit directions (`directions`)."""
    rng = np.random.default_rng(11)
    firing = rng.random((rows, features)) < l0 / features
    magnitudes = firing * (0.5 + rng.random((rows, features)))
    return (magnitudes @ directions(d_in, features)).astype(ml_dtypes.bfloat16)


def directions(d_in: int, features: int = 64) -> NDArray[np.float64]:
    """Return the dictionary of `sparse_rows`, (features, d_in), unit rows."""
    rows = np.random.default_rng(5).standard_normal((features, d_in))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_contexts(contexts: int, context_size: int, seed: int = 3, parts: int = 1) -> dict[str, NDArray[Any]]:
    """Return context arrays: documents of `parts` contexts each, every seventh held out, with EOS here and there."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 50, (contexts, context_size)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.05] = EOS
    tokens[:, 0] = BOS
    number = np.arange(contexts, dtype=np.int64) // parts
    split = (number % 7 == 3).astype(np.uint8)
    return {
        "contexts/tokens": tokens,
        "contexts/split": split,
        "documents/start": np.arange(contexts, dtype=np.int64) * context_size + 1,
        "documents/id": number,
        "documents/split": split,
    }


def make_plan(contexts: ContextsSpec, arrays: dict[str, NDArray[Any]], sites: dict[str, int], **fields: Any) -> Plan:
    """Return a plan over these contexts; sites: width by name."""
    tokens, split = arrays["contexts/tokens"], arrays["contexts/split"]
    counts = order.row_mask(tokens, (BOS, EOS), fields.get("dropped_positions", ())).sum(axis=1)
    window_rows = fields.pop("window_rows", 1024)
    dtype = fields.pop("dtype", "bfloat16")
    values: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": ModelSource(
            id="tiny",
            revision=None,
            weights_sha256=NOBODY,
            dtype=dtype,
            attn_implementation="sdpa",
            accelerator="cpu",
            threads=1,
        ),
        "tokenizer": TokenizerSource(id="tiny", sha256=NOBODY, bos_id=BOS, eos_id=EOS, excluded_ids=(BOS, EOS)),
        "dataset": DatasetSource(id="random", revision=None, split="train", text_field="text", sha256=None),
        "contexts": contexts,
        "sites": tuple(
            SiteSpec(
                name=name,
                folder=name,
                module=f"model.layers.{name.split('.')[1]}.mlp",
                hook="out",
                hook_name=f"blocks.{name.split('.')[1]}.hook_mlp_out",
                d_in=d_in,
            )
            for name, d_in in sites.items()
        ),
        "requested_rows": None,
        "rows": int(counts[split == 0].sum()),
        "heldout_rows": int(counts[split == 1].sum()),
        "heldout": 0.1,
        "dropped_positions": (),
        "seed": 0,
        "window_rows": window_rows,
        "chunk_rows": chunk_rows(max(sites.values()), dtype, window_rows),
        "batch_size": 4,
        "codec": "planes",
        "level": 1,
        "versions": {},
    }
    return Plan(**(values | fields))


def make_store(
    root: Path,
    *,
    contexts: int = 140,
    context_size: int = 32,
    sites: dict[str, int] | None = None,
    rows: Rows = normal_rows,
    parts: int = 1,
    **fields: Any,
) -> Store:
    """Write a store at `root`: row i of every site is `rows(contexts * context_size, d_in)[source]`.

    parts: into how many parts each document was cut, of one context each.
    """
    sites = sites or {"mlp.1": 32}
    arrays = random_contexts(contexts, context_size, parts=parts)
    plan = make_plan(write_contexts(root, arrays, ended_early=False), arrays, sites, **fields)
    write_plan(root, plan)
    everywhere = {name: rows(contexts * context_size, d_in) for name, d_in in sites.items()}
    for split, window, source in sources_of(plan, arrays):
        write_window(root, plan, split, window, {n: x[source] for n, x in everywhere.items()}, source)
    write_manifest(root, plan)
    return open_store(root)


def sources_of(plan: Plan, arrays: dict[str, NDArray[Any]]) -> list[tuple[Any, int, NDArray[np.int64]]]:
    """Return (split, window, sources in stored order) of every window."""
    mask = order.row_mask(arrays["contexts/tokens"], (BOS, EOS), plan.dropped_positions)
    found = []
    for split, window in all_windows(plan):
        laid = order.layout(
            arrays["contexts/split"],
            mask.sum(axis=1),
            split,
            plan.seed,
            plan.window_rows,
            None,
        )
        own = laid.window(window)
        found.append((split, window, own.sources(mask[own.contexts])[order.stored_order(own, split, plan.seed)]))
    return found
