"""A synthetic run folder with known curves: Gated needs `RATIO` times fewer latents at every score.

No training and no language model, so that what the report must show is known to the last digit.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

RATIO = 2.5
DOCUMENTS = 60
ROWS = 100  # a document
METRIC_LINES = 300


def scores(l0: float) -> tuple[float, float]:
    """Loss recovered and explained variance of a Gated SAE: smooth, rising in log L0."""
    return 1 - 0.28 * l0**-0.42, 1 - 0.75 * l0**-0.3


def eval_json(
    arch: str, l0: float, l1: float, *, seed: int = 0, ce: bool = True, site: str = "mlp.10"
) -> dict[str, Any]:
    gated = arch == "gated"
    ce_score, ev = scores(l0 if gated else l0 / RATIO)
    rng = np.random.default_rng(int(l0 * 1000) + seed)
    weight = np.random.default_rng(7).uniform(0.5, 1.5, DOCUMENTS)  # the same documents for every SAE
    noise = 1 + 0.3 * rng.normal(size=DOCUMENTS)
    noise /= (noise * weight).sum() / weight.sum()
    clean, zero = 300 * weight, 300 * weight + 20
    spliced = clean + (1 - ce_score) * (zero - clean) * noise
    kl_zero = 25 * weight
    kl_spliced = (1 - ce_score) * kl_zero * noise
    sst, rows = 1000 * weight, np.full(DOCUMENTS, ROWS)
    sse, l0_sums = (1 - ev) * sst * noise, l0 * ROWS * weight
    model = {"clean": clean, "spliced": spliced, "zero": zero, "kl_spliced": kl_spliced, "kl_zero": kl_zero}
    d_sae = 1024 if gated else 1536
    return {
        "sae": f"{arch}-w{d_sae}-l1_{l1:g}-seed{seed}",
        "architecture": arch,
        "d_in": 576,
        "d_sae": d_sae,
        "l1_coefficient": l1,
        "lr": 0.001,
        "seed": seed,
        "site": site,
        "store_digest": "5f" * 32,
        "rows": DOCUMENTS * ROWS,
        "rows_skipped": 3,
        "max_norm_multiple": 10.0,
        "l0": float(l0_sums.sum() / rows.sum()),
        "explained_variance": float(1 - sse.sum() / sst.sum()),
        "mse": float(sse.sum() / (DOCUMENTS * ROWS)),
        "gamma": 1.003 + 0.004 * l1 if gated else 0.95 - 0.2 * l1,
        "gamma_centred": 1.004 + 0.005 * l1 if gated else 0.94 - 0.3 * l1,
        "cossim": 0.9,
        "l2_ratio": 0.97,
        "dead": 0.02 + 0.1 * l1,
        "silent": 0.05,
        "dense": 0.01,
        "density": density(d_sae, l0 / d_sae),
        "all_rows": {"rows": 4003},
        "ce_loss_score": float(1 - (spliced - clean).sum() / (zero - clean).sum()) if ce else None,
        "ce_loss_score_mean": 0.8 if ce else None,
        "ce_loss_score_all_positions": 0.99 if ce else None,
        "kl_div_score": float(1 - kl_spliced.sum() / kl_zero.sum()) if ce else None,
        "language_model": {"contexts": DOCUMENTS, "documents": DOCUMENTS} if ce else None,
        "standard_errors": {"l0": 0.05 * l0, "explained_variance": 0.01, "gamma": 0.002}
        | ({"ce_loss_score": 0.02, "kl_div_score": 0.02} if ce else {}),
        "heldout_documents": DOCUMENTS,
        "per_document": {
            "rows": rows.tolist(),
            "l0": l0_sums.tolist(),
            "sse": sse.tolist(),
            "sst": sst.tolist(),
            "tokens": [ROWS] * DOCUMENTS if ce else None,
            **{key: column.tolist() if ce else None for key, column in model.items()},
        },
    }


def density(d_sae: int, middle: float) -> dict[str, Any]:
    """Latents spread over a decade about `middle`, as a share of the rows; a twentieth of them silent."""
    edges = np.linspace(-8, 0, 33)
    weight = np.exp(-0.5 * ((edges[:-1] + 0.125 - np.log10(middle)) / 0.5) ** 2)
    latents = np.floor(0.95 * d_sae * weight / weight.sum()).astype(int)
    return {"log10_edges": edges.tolist(), "latents": latents.tolist(), "silent": int(d_sae - latents.sum())}


def sweep(seed: int = 0, ce: bool = True, site: str = "mlp.10") -> list[dict[str, Any]]:
    """Five sparsities of each architecture; the grids of L0 are a factor `RATIO` apart."""
    l0 = [64.0, 36.0, 20.0, 11.0, 6.0]
    gated = [
        eval_json("gated", x, l1, seed=seed, ce=ce, site=site)
        for x, l1 in zip(l0, (0.06, 0.1, 0.17, 0.29, 0.5), strict=True)
    ]
    relu = [
        eval_json("relu", x * RATIO, l1, seed=seed, ce=ce, site=site)
        for x, l1 in zip(l0, (0.04, 0.06, 0.09, 0.15, 0.25), strict=True)
    ]
    return gated + relu


def write_run(
    folder: Path, evaluations: list[dict[str, Any]], *, model: str = "org/SmolLM2-135M", note: str = ""
) -> Path:
    """A run folder as training and evaluation leave it. `note` goes wherever free text may stand."""
    folder.mkdir(parents=True)
    settings = [
        'site = "mlp.10"',
        "steps = 2400",
        "batch_size = 512",
        f"note = {json.dumps(note)}",
    ]
    sae = "[[sae]]\narch = {architecture}\nwidth = {d_sae}\nl1 = {l1_coefficient}\nlr = {lr}\nseed = {seed}"
    quoted = [{**e, "architecture": json.dumps(e["architecture"])} for e in evaluations]
    tables = ['[store]\npaths = ["/home/someone/data/store"]\ndigest = "5f"', *(sae.format(**e) for e in quoted)]
    (folder / "config.toml").write_text("\n".join([*settings, *tables]) + "\n")
    with (folder / "metrics.jsonl").open("w") as metrics:
        for step in range(0, METRIC_LINES * 8, 8):
            for e in evaluations:
                done = 1 - 0.9 ** (step / 60 + 1)
                line = {
                    "step": step,
                    "rows": step * 512,
                    "sae": e["sae"],
                    "loss": 2.1 - done,
                    "l0": e["l0"] * (30 - 29 * done),
                }
                line |= {
                    "explained_variance": e["explained_variance"] * done,
                    "gamma": e["gamma"] * (0.8 + 0.2 * done),
                    "dead": e["dead"] * done,
                }
                metrics.write(json.dumps(line) + "\n")
    for i, e in enumerate(evaluations):
        sae = folder / "saes" / f"{i}"
        sae.mkdir(parents=True)
        ours = {
            "version": "0.1.0",
            "site": e["site"],
            "store_digest": e["store_digest"],
            "steps": 2400,
            "batch_size": 512,
            "rows": 1228800,
        }
        ours |= {"name": e["sae"], "data_seed": 0, "scale": 0.0412, "max_norm_multiple": 10.0}
        metadata = {
            "model_name": model,
            "dataset_path": "builtin:pydoc",
            "hook_name": "blocks.10.hook_mlp_out",
            "context_size": 128,
        }
        (sae / "cfg.json").write_text(
            json.dumps({"architecture": e["architecture"], "d_in": 576, "metadata": metadata | {"gsae": ours}})
        )
        (sae / "eval.json").write_text(json.dumps(e))
    return folder
