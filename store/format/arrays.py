"""Which arrays a store has, and the Zarr metadata that lets any Zarr v3 reader walk them.

All of it follows from the plan, so metadata is written once, at the start, and is checked by making it again.
"""

from typing import Any, Literal

from gsae.store.codec.chunks import ArraySpec

from .plan import Plan, canonical_json
from .row_order import SPLITS, Split

SOURCE = "source"
GROUPS = ("contexts", "documents", "heldout", "train")
SMALL_CHUNK_BYTES = 1 << 20
SMALL_CHUNKS_OF_SHARD = 64


def rows_of(plan: Plan, split: Split) -> int:
    """Rows of a split."""
    return plan.rows if split == "train" else plan.heldout_rows


def windows_of(plan: Plan, split: Split) -> int:
    """Windows of a split."""
    return plan.windows if split == "train" else plan.heldout_windows


def site_array(plan: Plan, split: Split, name: str) -> ArraySpec:
    """Return the array of a site (by its folder's name, or `source`) in a split."""
    rows = rows_of(plan, split)
    if name == SOURCE:
        codec: Literal["zstd", "none"] = "none" if plan.codec == "none" else "zstd"
        return ArraySpec(f"{split}/{SOURCE}", "int64", (rows,), plan.chunk_rows, plan.window_rows, codec)
    width = next(s.d_in for s in plan.sites if s.folder == name)
    shape = (rows, width)
    return ArraySpec(
        f"{split}/{name}", plan.model.dtype, shape, plan.chunk_rows, plan.window_rows, plan.codec, plan.level
    )


def window_arrays(plan: Plan, split: Split) -> list[ArraySpec]:
    """Return the arrays whose shard `w` is window `w`: every site in the plan's order, then the sources."""
    return [site_array(plan, split, name) for name in (*(s.folder for s in plan.sites), SOURCE)]


def context_arrays(contexts: int, context_size: int, documents: int) -> list[ArraySpec]:
    """Return the arrays of tokens and documents; always in standard codecs."""
    return [
        _small("contexts/tokens", "int32", (contexts, context_size)),
        _small("contexts/split", "uint8", (contexts,)),
        _small("documents/start", "int64", (documents,)),
        _small("documents/id", "int64", (documents,)),
        _small("documents/split", "uint8", (documents,)),
    ]


def _small(path: str, dtype: str, shape: tuple[int, ...]) -> ArraySpec:
    whole = ArraySpec(path, dtype, shape, 1, 1, "zstd")
    chunk = 1 << max((SMALL_CHUNK_BYTES // whole.row_bytes).bit_length() - 1, 0)
    return ArraySpec(path, dtype, shape, chunk, chunk * SMALL_CHUNKS_OF_SHARD, "zstd")


def all_arrays(plan: Plan) -> list[ArraySpec]:
    """Return every array of a store."""
    c = plan.contexts
    rows = [spec for split in SPLITS for spec in window_arrays(plan, split)]
    return [*context_arrays(c.contexts, c.context_size, c.documents), *rows]


def metadata_files(plan: Plan) -> dict[str, bytes]:
    """Return every `zarr.json` of a store by its path; the root's has the others in it (consolidated)."""
    nodes: dict[str, dict[str, Any]] = {group: _group({}) for group in GROUPS}
    nodes |= {spec.path: spec.metadata() for spec in all_arrays(plan)}
    root = _group(
        {
            "gsae": {
                "schema_version": plan.schema_version,
                "model": plan.model.id,
                "dataset": plan.dataset.id,
                "context_size": plan.context_size,
                "sites": {s.name: s.folder for s in plan.sites},
            }
        }
    )
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": nodes}
    files = {f"{path}/zarr.json": canonical_json(node) for path, node in nodes.items()}
    return files | {"zarr.json": canonical_json(root)}


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}
