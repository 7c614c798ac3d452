"""Small features folders as `gsae features` writes them, with values that tests can compute, and hostile texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gsae.features.find.parquet import contexts_schema, examples_schema, latents_schema, write_vocabulary, writing

ROWS, CONTEXT_SIZE, BINS, QUANTILES = 10_000, 64, 10, 2
HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"'&amp;`${1}",
    "\u202egnp\u202c",  # right-to-left override
    "a\u200bb\u2060c\ufeff",  # zero-width characters
    "\x00\x1b[31m\x7f\x85",  # control characters
    " \t\r\n\n",
    "עברית",
    "\u0301\u0327x",  # combining marks with nothing to stand on
    "",
    "\u3164\U000e0041",  # a filler, and a tag character
    "__proto__",
)
TEXTS = (*HOSTILE, *(f" word{i}" for i in range(len(HOSTILE), 200)))


def rows_fired_by(latent: int) -> int:
    """On how many rows a latent fires: none for every fifth one."""
    return 0 if latent % 5 == 4 else 1 + (latent * 37) % 2000


def top_of(latent: int) -> float:
    """The largest value of a latent."""
    return 1 + (latent * 13 % 101) / 10


def write_features(
    run: Path,
    name: str = "gated-w100",
    *,
    architecture: str = "gated",
    d_sae: int = 100,
    words: bool = True,
    logits: bool = True,
    **changed: Any,
) -> Path:
    """Write RUN/features/NAME: latents 0 to d_sae - 1, latent l's top token being l of the vocabulary."""
    folder = run / "features" / name
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {"schema": 1, "sae": name, "architecture": architecture, "d_in": 8, "d_sae": d_sae}
    facts |= {"weights_sha256": name, "site": "mlp.1", "module": "m", "hook_name": "h", "model": "tiny"}
    facts |= {"dataset": "text", "store_digest": "d", "context_size": CONTEXT_SIZE, "split": "heldout", "rows": ROWS}
    facts |= {"rows_skipped": 0, "contexts": 40, "top": 2, "quantiles": QUANTILES, "samples": 1, "bins": BINS}
    facts |= {"neighbours": 3, "logits": 2, "has_tokens": words, "has_logits": logits}
    latents, examples = _latents(d_sae, logits), _examples(d_sae)
    for file, schema, table in (
        ("latents", latents_schema(), latents),
        ("examples", examples_schema(), examples),
        ("contexts", contexts_schema(), [{"context": c, "token_ids": tokens_of(c)} for c in range(0, 80, 2)]),
    ):
        with writing(folder / f"{file}.parquet", schema) as writer:
            writer.write_table(pa.Table.from_pylist(table, schema))
    if words:
        write_vocabulary(folder / "vocabulary.parquet", TEXTS)
    (folder / "features.json").write_text(json.dumps(facts | changed))
    return folder


def tokens_of(context: int) -> list[int]:
    """The token ids of a context: all of HOSTILE are in each."""
    return [(context + i) % len(TEXTS) if i >= len(HOSTILE) else i for i in range(CONTEXT_SIZE)]


def _latents(d_sae: int, logits: bool) -> list[dict[str, Any]]:
    found = []
    for latent in range(d_sae):
        rows, top, near = rows_fired_by(latent), top_of(latent), [(latent + i) % d_sae for i in (1, 2, 3)]
        figures: dict[str, Any] = {"latent": latent, "rows": rows, "density": rows / ROWS}
        figures |= {"neighbours": near, "cosines": [0.5, 0.25, -0.125]}
        if rows:
            histogram = np.bincount(np.arange(rows) % BINS, minlength=BINS).tolist()
            figures |= {"max": top, "mean": top / 2, "histogram": histogram, "top_token": latent % len(TEXTS)}
            figures |= {"quantile_edges": [top / 10, top / 2, top]}
        if logits:
            figures |= {"promoted": [0, latent % len(TEXTS)], "promoted_logits": [1.5, 0.5]}
            figures |= {"suppressed": [1, 2], "suppressed_logits": [-2.5, -1.0]}
        found.append(figures)
    return found


def _examples(d_sae: int) -> list[dict[str, Any]]:
    """Two top examples a latent and one of each quantile: contexts 2 l and on, at its place and the next."""
    found = []
    for latent in (one for one in range(d_sae) if rows_fired_by(one)):
        for kind, quantile, rank, share in (
            ("top", None, 0, 1.0),
            ("top", None, 1, 0.8),
            ("sample", 0, 0, 0.2),
            ("sample", 1, 0, 0.6),
        ):
            context, place = 2 * ((latent + rank + 3 * (quantile or 0)) % 40), 20 + latent % 30
            value = top_of(latent) * share
            one = {"latent": latent, "kind": kind, "quantile": quantile, "rank": rank, "context": context}
            one |= {"position": place, "value": value, "positions": [3, place, place + 1]}
            found.append(one | {"values": [value / 4, value, value / 2]})
    return found
