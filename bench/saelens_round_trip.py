"""Does SAELens read an SAE of ours, and compute with it what we compute, to 1e-5 of the largest magnitude?

Run as `.venv/bin/python bench/saelens_round_trip.py [--run RUN --store STORE]` after `make bench-peers`.
Without a run it trains a Gated and a baseline SAE on rows made up here. It computes features and
reconstructions of held-out rows, then calls itself with `--peer` in the peers' venv, which compares.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

PEER = Path(".venv-peers/bin/python")
TOLERANCE = 1e-5
ROWS, D_IN, STEPS, SITE = 4096, 576, 60, "mlp.10"


def main() -> int:
    """Print one JSON line an SAE and the verdict; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run of `gsae train`")
    parser.add_argument("--store", type=Path, help="the store it was trained from")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        for line in compare(options.peer):
            print(json.dumps(line))
        return 0
    if (options.run is None) != (options.store is None):
        parser.error("--run and --store go together")
    if not PEER.exists():
        parser.error(f"{PEER} is not there. Run `make bench-peers` first, from the repository root.")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run, store = make_run(work) if options.run is None else (options.run, options.store)
        ours(run, store, work)
        lines = peer_lines(work)
    return verdict(lines)


def verdict(lines: list[dict[str, Any]]) -> int:
    """Print what was found and the last line."""
    for line in lines:
        print(json.dumps(line))
    worst = {key: max(line[key] for line in lines) for key in ("max_feature_error", "max_reconstruction_error")}
    differing = sum(line["gates_differing"] for line in lines)
    beyond = sum(line["gates_differing_beyond_rounding"] for line in lines)
    met = max(worst.values()) <= TOLERANCE and beyond == 0
    last = {"bench": "saelens_round_trip", "met": met, **worst, "gates_differing": differing}
    print(json.dumps({**last, "tolerance": TOLERANCE, "sae_lens": lines[0]["sae_lens"], "saes": len(lines)}))
    return 0 if met else 1


# -- in our environment


def make_run(work: Path) -> tuple[Path, Path]:
    """Write a store of rows made up like a language model's, train a Gated and a baseline SAE; run and store."""
    from gsae.tests.support.stores import make_store
    from gsae.train import RunConfig, parse_sae, train

    sizes = {"contexts": 210, "context_size": 128, "window_rows": 1 << 14}
    store = make_store(work / "store", sites={SITE: D_IN}, rows=some_rows, **sizes)
    saes = parse_sae("gated width=1024 l1=0.2") + parse_sae("relu width=1536 l1=0.2")
    train(store.site(SITE), RunConfig(site=SITE, batch_size=512, steps=STEPS, saes=saes), work / "run")
    return work / "run", work / "store"


def some_rows(rows: int, d_in: int) -> NDArray[Any]:
    """Make bfloat16 rows (rows, d_in): a large mean, uneven channels, heavy tails, sparse directions."""
    import ml_dtypes

    draw = np.random.default_rng(0)
    channels = np.exp(draw.standard_normal(d_in))
    features = (draw.random((rows, 2 * d_in)) < 0.02) * draw.exponential(1, (rows, 2 * d_in))
    signal = features @ draw.standard_normal((2 * d_in, d_in)) + draw.standard_normal((rows, d_in))
    size = np.exp(0.5 * draw.standard_normal((rows, 1)))
    mean = 5 * draw.standard_normal(d_in)
    return ((mean + size * signal) * channels).astype(ml_dtypes.bfloat16)


@torch.no_grad()
def ours(run: Path, store: Path, work: Path) -> None:
    """Write for each SAE up to ROWS held-out rows, and features and reconstructions as we compute them."""
    from gsae.evaluate import site_of
    from gsae.store import open_store
    from gsae.train import load_sae

    _, rows = next(iter(open_store(store).site(site_of(run), split="heldout").in_order(ROWS)))
    x = rows.float()
    for number, folder in enumerate(sorted(run.glob("saes/*/"))):
        sae = load_sae(folder)
        f = sae.encode(x)
        results = {"x": x, "features": f, "reconstruction": sae.decode(f)}
        save_file(results, work / f"{number:04}.safetensors", {"folder": str(folder.resolve())})


def peer_lines(work: Path) -> list[dict[str, Any]]:
    """Let the peers' environment compare what stands in `work`."""
    command = [str(PEER), __file__, "--peer", str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


# -- in the peers' environment


def compare(work: Path) -> Iterator[dict[str, Any]]:
    """Load each SAE with SAELens and compare with our results on the same rows."""
    warnings.simplefilter("ignore")
    import sae_lens
    from safetensors import safe_open

    for path in sorted(work.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            folder = file.metadata()["folder"]
        results = load_file(path)
        sae = sae_lens.SAE.load_from_disk(folder)
        with torch.no_grad():
            x = results["x"]
            # At attention sites SAELens takes heads apart; one head of the whole width is the same sum.
            heads = x[:, None] if sae.cfg.reshape_activations == "hook_z" else x
            features = sae.encode(heads)
            reconstruction = sae.decode(features).reshape(x.shape)
            figures = differences(sae, results, features, reconstruction)
        yield {"sae": Path(folder).name, "sae_lens": sae_lens.__version__, **figures}


def differences(sae: Any, ours: dict[str, Tensor], features: Tensor, reconstruction: Tensor) -> dict[str, Any]:
    """Return the largest errors, relative to the largest magnitude.

    A gate whose pre-activation is 0 to within rounding may open in one product and not in the other. Such
    gates are counted, their rows left out of the errors; any other that differs counts as beyond rounding.
    """
    differing = (features > 0) != (ours["features"] > 0)
    alike = ~differing.any(dim=1)
    return {
        "architecture": sae.cfg.architecture(),
        "rows": len(features),
        "l0": float((features > 0).sum(1).float().mean()),
        "max_feature_error": relative(features[alike], ours["features"][alike]),
        "max_reconstruction_error": relative(reconstruction[alike], ours["reconstruction"][alike]),
        "gates_differing": int(differing.sum()),
        "gates_differing_beyond_rounding": int((differing & ~near_zero(sae, ours["x"])).sum()),
    }


def near_zero(sae: Any, x: Tensor) -> Tensor:
    """Say which latents (rows, d_sae) have a pre-activation of 0, to within TOLERANCE of the largest."""
    a = (x.double() - sae.b_dec.double()) @ sae.W_enc.double()
    if sae.cfg.architecture() != "gated":
        a = a + sae.b_enc.double()
        return a.abs() <= TOLERANCE * a.abs().max()
    gate = a + sae.b_gate.double()
    magnitude = a * sae.r_mag.double().exp() + sae.b_mag.double()
    return torch.minimum(gate.abs(), magnitude.abs()) <= TOLERANCE * gate.abs().max()


def relative(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest magnitude."""
    return float((a - b).abs().max() / b.abs().max())


if __name__ == "__main__":
    sys.exit(main())
