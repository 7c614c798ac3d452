"""The columns of latents.parquet and examples.parquet for a range of latents."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from gsae.store import Store, StoreSet

from .directions import neighbours, outermost
from .firings import joined
from .parquet import arrow, lists, ragged
from .portrait import Portrait
from .settings import FeatureSettings
from .vocabulary import LogitEffects


def firing_columns(
    portraits: Sequence[Portrait | None], first: int, rows: int, store: Store | StoreSet
) -> dict[str, Any]:
    """Return the columns of latents.parquet that follow from firings.

    portraits: of latents `first` and on, None for one that never fires. rows: on which the SAE ran.
    """
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


def decoder_columns(
    W_dec: Tensor, unit: Tensor, first: int, last: int, settings: FeatureSettings, effects: LogitEffects | None
) -> dict[str, Any]:
    """Return the columns of latents.parquet that follow from decoder rows, for latents `first` to `last` - 1.

    W_dec: (d_sae, d_in). unit: the same rows, of length 1.
    """
    pa, _ = arrow()
    near, cosines = neighbours(unit, first, last, settings.neighbours)
    columns = {"neighbours": _lists(near, "int32"), "cosines": _lists(cosines, "float32")}
    names = ("promoted", "suppressed")
    if effects is None:
        nothing: list[NDArray[Any] | None] = [None] * (last - first)
        for name in names:
            columns |= {name: lists(nothing, pa.int32()), f"{name}_logits": lists(nothing, pa.float32())}
        return columns
    for name, (ids, logits) in zip(names, outermost(effects(W_dec[first:last]), settings.logits), strict=True):
        columns |= {name: _lists(ids, "int32"), f"{name}_logits": _lists(logits, "float32")}
    return columns


def example_columns(portraits: Sequence[Portrait | None], first: int, context_size: int) -> dict[str, Any]:
    """Return the columns of examples.parquet; portraits: of latents `first` and on."""
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


def _lists(values: Tensor, kind: str) -> Any:
    """Return an Arrow array of lists of `kind` from values (rows, n)."""
    pa, _ = arrow()
    return lists(list(values.numpy()), getattr(pa, kind)())
