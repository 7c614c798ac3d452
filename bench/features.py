"""Does describing 65,536 latents over a million rows take bounded memory, and what does a row cost as latents grow?

Run as `.venv/bin/python bench/features.py [--rows N] [--latents F,F2,...]`. A synthetic Gated SAE of random unit
directions on random rows of width 128, its thresholds set so that about 50 latents fire on a row; no language model.
The limit of the pass is the encoder's product alone, in blocks as large, timed in the same process.
For each number of latents, in a process of its own: a whole `find_features`, its time a row, for the pass and
a latent after it; its peak resident size beyond what the process had before, and bytes written. The bound on memory:
a range of firings, the SAE three times, a pass's product twice, one window of the store, and 0.75 GiB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

D_IN, CONTEXT_SIZE, WINDOW_ROWS, FIRING = 128, 256, 1 << 16, 50
BESIDE_BYTES = 3 << 28  # Parquet's buffers, the portraits of 1,024 latents, cosines with all latents


def main() -> int:
    """Print one JSON line a number of latents, and the verdict; return 0 when memory stays below its bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--latents", default="4096,16384,65536")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(Path(options.child[0]), Path(options.child[1]), int(options.child[2]))
    found = []
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "store"
        write_store(store, options.rows)
        for latents in map(int, options.latents.split(",")):
            command = [sys.executable, __file__, "--child", str(store), str(Path(name) / str(latents)), str(latents)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(found[-1]), flush=True)
    first, last = found[0], found[-1]
    met = all(one["peak_bytes"] <= one["bound_bytes"] for one in found)
    growth = {
        "latents": last["latents"] / first["latents"],
        "microseconds_a_row": round(last["microseconds_a_row"] / first["microseconds_a_row"], 2),
    }
    print(json.dumps({"bench": "features", "met": met, "growth": growth, **last}))
    return 0 if met else 1


def write_store(root: Path, rows: int) -> None:
    """Write a store of sparse sums of known directions with about this many held-out rows."""
    from gsae.tests.support.stores import make_store

    def drawn(count: int, d_in: int) -> NDArray[Any]:
        rng = np.random.default_rng(0)
        return rng.standard_normal((count, d_in), np.float32).astype(ml_dtypes.bfloat16)

    # Every seventh context is held out, so the train split is what is looked at; a row in twenty is no row.
    contexts = round(rows / (0.95 * (CONTEXT_SIZE - 1)) * 7 / 6)
    make_store(root, contexts=contexts, context_size=CONTEXT_SIZE, sites={"mlp.1": D_IN}, rows=drawn,
               window_rows=WINDOW_ROWS)  # fmt: skip


def child(store_path: Path, run: Path, latents: int) -> int:
    """Describe the latents of one SAE, and print what it took."""
    from gsae.evaluate import Progress
    from gsae.features import Vocabulary, find_features
    from gsae.store import open_store
    from gsae.tests.support.peak import forget_peak, peak_bytes
    from gsae.train import GatedParams, SAEMetadata
    from gsae.train.sae import save_sae

    store = open_store(store_path)
    draw = torch.Generator().manual_seed(1)
    W = torch.nn.functional.normalize(torch.randn(latents, D_IN, generator=draw), dim=1)
    sample = store.site("mlp.1")[:512].float() @ W.T
    threshold = sample.reshape(-1)[:: max(1, sample.numel() // (1 << 20))].quantile(1 - FIRING / latents)
    zero, bias = torch.zeros(latents), torch.full((latents,), -float(threshold))
    params = GatedParams(W_enc=W, b_gate=bias, r_mag=zero, b_mag=bias.clone(), W_dec=W.clone(), b_dec=torch.zeros(D_IN))
    noted = {"architecture": "gated", "l1_coefficient": 0.1, "lr": 1e-3, "seed": 0, "site": "mlp.1",
             "store_digest": store.digest, "max_norm_multiple": 0.0, "norm_limit": None}  # fmt: skip
    save_sae(run / "saes" / "one", params, scale=1.0, site=store.site("mlp.1").spec, plan=store.plan,
             gsae=SAEMetadata(**noted))  # fmt: skip
    ends: dict[str, float] = {}

    def listen(event: Progress) -> None:
        ends[event.stage] = time.perf_counter()

    forget_peak()  # the making of the SAE
    before = peak_bytes()
    began = time.perf_counter()
    (facts,) = find_features(run, store, Vocabulary(), split="train", listen=listen)
    ended, peak = time.perf_counter(), peak_bytes() - before
    files = {path.name: path.stat().st_size for path in (run / "features" / "one").rglob("*") if path.is_file()}
    firings = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    rows = facts["rows"]
    bound = (5 << 26) + 3 * 2 * 4 * latents * D_IN + (2 << 27) + WINDOW_ROWS * D_IN * 2 + BESIDE_BYTES
    print(json.dumps({
        "latents": latents,
        "rows": rows,
        "firing_a_row": round(firings / 12 / rows, 1),
        "microseconds_a_row": round((ended - began) / rows * 1e6, 1),
        "of_which_the_pass": round((ends["activations"] - began) / rows * 1e6, 1),
        "the_product_alone": round(product_alone(params.W_enc) * 1e6, 1),
        "milliseconds_a_latent_after": round((ended - ends["activations"]) / latents * 1e3, 3),
        "peak_bytes": peak,
        "bound_bytes": bound,
        "firings_bytes": firings,
        "other_bytes": sum(files.values()) - firings,
    }))  # fmt: skip
    return 0


def product_alone(W_enc: torch.Tensor, rows: int = 1 << 14) -> float:
    """Return the seconds a row of the encoder's product, the median of three times over `rows`."""
    from gsae.features.find.firings import PASS_ELEMENTS

    step = PASS_ELEMENTS // len(W_enc)
    x, out, times = torch.randn(rows, D_IN), torch.empty(step, len(W_enc)), []
    for _ in range(4):
        began = time.perf_counter()
        for part in x.split(step):
            torch.mm(part, W_enc.T, out=out[: len(part)])
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) / rows


if __name__ == "__main__":
    sys.exit(main())
