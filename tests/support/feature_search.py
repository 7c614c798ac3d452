"""Compares the features of a real SAE with a search over the store in float64.

A value closer to a gate or to an edge of the histogram than the rounding of a float32 sum may go either way. Such rows
are counted as "undecided", and counts may differ by as many.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from numpy.typing import NDArray

from gsae.store import Store
from gsae.train import load_sae

ROUNDING = 2e-6  # of the largest value: what sums in float32 are off by
TOLERANCE = 1e-5


def compare(folder: Path, store: Store, count: int, seed: int = 0) -> dict[str, Any]:
    """Compare `count` latents of RUN/features/NAME, drawn among those that fire; `faults` says what differs."""
    facts = json.loads((folder / "features.json").read_text())
    latents = {row["latent"]: row for row in parquet.read_table(folder / "latents.parquet").to_pylist()}
    able = [latent for latent, row in latents.items() if row["rows"]]
    drawn = np.sort(np.random.default_rng(seed).choice(able, count, replace=False)).tolist()
    shown = parquet.read_table(folder / "examples.parquet", filters=[("latent", "in", drawn)]).to_pylist()
    sae = load_sae(folder.parent.parent / "saes" / folder.name)
    site = store.site(facts["site"], split=facts["split"])
    x, sources = site[:].double(), site.sources(slice(None))
    limit = sae.metadata["norm_limit"]
    here = (x.norm(dim=1) < (float("inf") if limit is None else limit)).numpy()
    features, gates = in_float64(sae.params, x[torch.from_numpy(here)], drawn)
    checks = [
        Check(latents[latent], [row for row in shown if row["latent"] == latent], facts, sources[here], f, gate)
        for latent, f, gate in zip(drawn, features.T, gates.T, strict=True)
    ]
    counted = [] if here.sum() == facts["rows"] else [f"{facts['rows']} rows, not {here.sum()}"]
    return {
        "latents": len(drawn),
        "rows": int(here.sum()),
        "examples": len(shown),
        "values": sum(check.values for check in checks),
        "largest_difference": max(check.largest for check in checks),
        "undecided": sum(check.undecided for check in checks),
        "faults": counted + [fault for check in checks for fault in check.faults],
    }


def in_float64(params: Any, x: torch.Tensor, latents: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features and gates (rows, latents) of x (rows, d_in) by eqs. 2, 6 and 7 of the paper, written out."""
    at = {name: tensor.double() for name, tensor in vars(params).items()}
    a = (x - at["b_dec"]) @ at["W_enc"][latents].T
    gate = a + (at["b_gate"] if "b_gate" in at else at["b_enc"])[latents]
    if "b_gate" not in at:
        return gate.clamp(min=0).numpy(), gate.numpy()
    if "W_mag" in at:
        a = (x - at["b_dec"]) @ at["W_mag"][latents].T
    magnitude = a * at["r_mag"][latents].exp() if "r_mag" in at else a
    f = (magnitude + at["b_mag"][latents]).clamp(min=0) * (gate > 0)
    return f.numpy(), torch.minimum(gate, magnitude + at["b_mag"][latents]).numpy()


class Check:
    """Compares one latent's figures and examples with its float64 features (rows,) and gates (rows,)."""

    def __init__(
        self, row: dict[str, Any], shown: list[dict[str, Any]], facts: dict[str, Any], sources: NDArray[np.int64],
        f: NDArray[np.float64], gate: NDArray[np.float64],
    ) -> None:  # fmt: skip
        self._latent, self.faults, self.largest, self.values = row["latent"], list[str](), 0.0, 0
        above, top = np.sort(f[f > 0]), f.max()
        near = int((np.abs(gate) < ROUNDING * max(1.0, np.abs(gate).max())).sum())
        edges = np.linspace(0, top, facts["bins"] + 1)
        at_edges = sum(int((np.abs(above - edge) < ROUNDING * top).sum()) for edge in edges[1:-1])
        self.undecided = near + at_edges
        self._same("rows", abs(row["rows"] - len(above)) <= near)
        self._same("density", row["density"] == row["rows"] / len(f))
        histogram = np.array(row["histogram"]) - np.histogram(above, edges)[0]
        self._same("histogram", np.abs(histogram).sum() <= near + 2 * at_edges)
        self._close("max", row["max"], top, top)
        self._close("mean", row["mean"], above.mean(), top, near * top / len(above))
        if not near:
            cuts = [len(above) * q // facts["quantiles"] for q in range(facts["quantiles"])]
            self._close("quantile_edges", row["quantile_edges"], above[[*cuts, -1]], top)
        context, position = np.divmod(sources, facts["context_size"])
        best = np.zeros(context.max() + 1)
        np.maximum.at(best, context, f)
        tops = [example for example in shown if example["kind"] == "top"]
        wanted = np.sort(best[best > 0])[::-1][: facts["top"]]
        self._same("number of top contexts", len(tops) == len(wanted))
        self._close("top contexts", [example["value"] for example in tops], wanted[: len(tops)], top)
        for example in shown:
            mine = np.flatnonzero(context == example["context"])
            mine = mine[np.argsort(position[mine])]
            mine = mine[f[mine] > 0]
            told = dict(zip(example["positions"], example["values"], strict=True))
            true = dict(zip(position[mine].tolist(), f[mine], strict=True))
            self._same("positions", near > 0 or list(told) == list(true))
            both = sorted(told.keys() & true.keys())
            self._close("values", [told[p] for p in both], [true[p] for p in both], top)
            self._same("an example's value", told[example["position"]] == example["value"])
            if example["kind"] == "sample":
                low, high = row["quantile_edges"][example["quantile"] :][:2]
                self._same("a sample's quantile", low <= example["value"] <= high)

    def _same(self, what: str, holds: bool) -> None:
        if not holds:
            self.faults.append(f"latent {self._latent}: {what}")

    def _close(self, what: str, told: Any, true: Any, of: float, spare: float = 0.0) -> None:
        difference = np.abs(np.asarray(told) - np.asarray(true))
        self.values += difference.size
        self.largest = max(self.largest, float(difference.max(initial=0)) / of) if not spare else self.largest
        self._same(what, bool((difference <= TOLERANCE * of + spare).all()))
