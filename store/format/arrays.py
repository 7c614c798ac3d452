"""Which arrays a store has, and the Zarr metadata with which any Zarr v3 reader finds them.

Both follow from the plan alone, so metadata is written once, at the start, and is checked by computing it again.
"""

from typing import Any, Literal

from gsae.store.codec.chunks import ArraySpec

from .json_files import canonical_json
from .plan import Plan
from .row_order import SPLITS, Split

SOURCE = "source"
DOCUMENTS = ("documents/start", "documents/id", "documents/split")
ZARR_GROUPS = ("contexts", "documents", "heldout", "train")
SMALL_CHUNK_BYTES = 1 << 20
SMALL_CHUNKS_OF_SHARD = 64


def split_rows(plan: Plan, split: Split) -> int:
    """Rows of a split."""
    return plan.rows if split == "train" else plan.heldout_rows


def split_windows(plan: Plan, split: Split) -> int:
    """Windows of a split."""
    return plan.windows if split == "train" else plan.heldout_windows


def site_array(plan: Plan, split: Split, name: str) -> ArraySpec:
    """Return the array of a site in a split; name: the site's folder, or `source` for the sources of the rows."""
    rows = split_rows(plan, split)
    if name == SOURCE:
        codec: Literal["zstd", "none"] = "none" if plan.codec == "none" else "zstd"
        return ArraySpec(f"{split}/{SOURCE}", "int64", (rows,), plan.chunk_rows, plan.window_rows, codec)
    width = next(s.d_in for s in plan.sites if s.folder == name)
    shape = (rows, width)
    return ArraySpec(
        f"{split}/{name}", plan.model.dtype, shape, plan.chunk_rows, plan.window_rows, plan.codec, plan.level
    )


def window_arrays(plan: Plan, split: Split) -> list[ArraySpec]:
    """Return the arrays of a split; shard w of each is window w. Sites are in the plan's order, sources come last."""
    return [site_array(plan, split, name) for name in (*(s.folder for s in plan.sites), SOURCE)]


def context_arrays(contexts: int, context_size: int, documents: int) -> list[ArraySpec]:
    """Return the arrays of tokens and documents. They always have standard codecs, which need nothing of gsae."""
    return [
        _small("contexts/tokens", "int32", (contexts, context_size)),
        _small("contexts/split", "uint8", (contexts,)),
        *(
            _small(path, dtype, (documents,))
            for path, dtype in zip(DOCUMENTS, ("int64", "int64", "uint8"), strict=True)
        ),
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
    """Return every `zarr.json` of a store by its path; the root's contains the others (consolidated metadata)."""
    nodes: dict[str, dict[str, Any]] = {group: _zarr_group({}) for group in ZARR_GROUPS}
    nodes |= {spec.path: spec.metadata() for spec in all_arrays(plan)}
    root = _zarr_group(
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


def _zarr_group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}
