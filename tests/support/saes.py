"""Saved SAEs of random weights in a run's folder, and what they compute, written out in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from gsae.store import Store

D_IN, D_SAE = 32, 48
MULTIPLE = 1.0  # so that many rows lie beyond the limit


def weights(arch: str, seed: int) -> dict[str, Tensor]:
    """Random weights in the layout of a saved SAE."""
    draw = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=draw), dim=1)
    tensors = {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec, "b_dec": 0.1 * torch.randn(D_IN, generator=draw)}
    own = ("b_gate", "b_mag", "r_mag") if arch == "gated" else ("b_enc",)
    return tensors | {name: 0.2 * torch.randn(D_SAE, generator=draw) for name in own}


def write_sae(run: Path, arch: str, seed: int, notes: dict[str, Any], scale: float = 1.0) -> Path:
    """Save an SAE as RUN/saes/ARCH-SEED with `notes` in its cfg.json."""
    folder = run / "saes" / f"{arch}-{seed}"
    folder.mkdir(parents=True)
    save_file({k: v * scale for k, v in weights(arch, seed).items()}, folder / "sae_weights.safetensors")
    cfg = {
        "architecture": "gated" if arch == "gated" else "standard", "d_in": D_IN, "d_sae": D_SAE,
        "dtype": "float32", "metadata": {"gsae": notes | {"architecture": arch}},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def training_notes(store: Store, **changed: Any) -> dict[str, Any]:
    """What training would note of an SAE that was fitted to mlp.1 of this store."""
    limit = store.site("mlp.1").moments.within(MULTIPLE).norm_limit
    return {
        "l1_coefficient": 0.1, "lr": 1e-3, "seed": 0, "site": "mlp.1", "store_digest": store.digest,
        "max_norm_multiple": MULTIPLE, "norm_limit": limit, "dead": 0.25,
    } | changed  # fmt: skip


def reconstruct(arch: str, seed: int, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latents and reconstructions of rows (rows, D_IN) by the paper's formulas."""
    w = {k: v.double().numpy() for k, v in weights(arch, seed).items()}
    a = (x - w["b_dec"]) @ w["W_enc"]
    if arch == "gated":
        f = (a + w["b_gate"] > 0) * np.maximum(np.exp(w["r_mag"]) * a + w["b_mag"], 0)
    else:
        f = np.maximum(a + w["b_enc"], 0)
    return f, f @ w["W_dec"] + w["b_dec"]
