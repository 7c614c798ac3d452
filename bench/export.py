"""Does dictionary_learning read what `gsae export` writes, and find our features?

Run as `.venv/bin/python bench/export.py [--run RUN]` after `make bench-peers`. Every SAE of a run, or, without one, a
Gated SAE and a baseline of random weights, is exported and read by dictionary_learning's `load_dictionary` in the
peers' environment; features and reconstructions of random rows are compared, relative to the largest.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PEER = Path(".venv-peers/bin/python")
ROWS, TOLERANCE = 4096, 1e-5
CODE = """
import sys, torch
from dictionary_learning.utils import load_dictionary
with torch.no_grad():
    for folder in sys.argv[1:]:
        dictionary, _ = load_dictionary(folder, "cpu")
        f = dictionary.encode(torch.load(folder + "/x.pt"))
        torch.save({"f": f, "x_hat": dictionary.decode(f)}, folder + "/theirs.pt")
"""


def main() -> int:
    """Print one JSON line an SAE and the verdict; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    options = parser.parse_args()
    if not PEER.exists():
        parser.error(f"{PEER} is not there. Run `make bench-peers` first, from the repository root.")
    from gsae.features import to_dictionary_learning
    from gsae.train import load_sae

    with tempfile.TemporaryDirectory() as scratch:
        saes = sorted(options.run.glob("saes/*")) if options.run else random_saes(Path(scratch) / "run")
        folders = [to_dictionary_learning(sae, Path(scratch) / sae.name) for sae in saes]
        for sae, folder in zip(saes, folders, strict=True):
            torch.save(rows_for(load_sae(sae)), folder / "x.pt")
        subprocess.run([str(PEER), "-c", CODE, *map(str, folders)], check=True)
        worst = 0.0
        for sae, folder in zip(saes, folders, strict=True):
            errors = compared(load_sae(sae), torch.load(folder / "x.pt"), torch.load(folder / "theirs.pt"))
            worst = max(worst, *errors.values())
            print(json.dumps({"sae": sae.name, **errors}), flush=True)
    met = worst <= TOLERANCE
    print(json.dumps({"bench": "export", "met": met, "saes": len(saes), "worst": worst, "tolerance": TOLERANCE}))
    return 0 if met else 1


def rows_for(sae: Any) -> torch.Tensor:
    """Random rows about the decoder's bias, of a size at which some latents fire."""
    noise = torch.randn(ROWS, sae.d_in, generator=torch.Generator().manual_seed(0))
    return sae.params.b_dec + noise * (1 + sae.params.b_dec.std())


def compared(sae: Any, x: torch.Tensor, theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest differences of features and reconstructions, relative to the largest of ours."""
    f = sae.encode(x)
    ours = {"f": f, "x_hat": sae.decode(f)}
    assert (f > 0).any(), "no latent fires, so nothing would be compared"
    return {name: float((theirs[name] - value).abs().max() / value.abs().max()) for name, value in ours.items()}


def random_saes(run: Path) -> list[Path]:
    """A Gated SAE and a baseline, as a run saves them."""
    from gsae.tests.support.params import random_params
    from gsae.tests.support.stores import make_store
    from gsae.train import SAEMetadata
    from gsae.train.sae import save_sae

    store = make_store(run / "store", contexts=20)
    site, folders = store.site("mlp.1"), []
    for arch in ("gated", "relu"):
        folders.append(run / "saes" / arch)
        params = random_params(arch, site.d_in, 512)
        save_sae(folders[-1], params, scale=0.3, site=site.spec, plan=store.plan, gsae=SAEMetadata())
    return folders


if __name__ == "__main__":
    sys.exit(main())
