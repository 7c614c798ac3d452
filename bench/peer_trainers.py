"""Do dictionary_learning's `trainSAE` and SAELens's `SAETrainer` train from our batches as they are?

Run as `.venv/bin/python bench/peer_trainers.py [--store STORE --site SITE]` after `make bench-peers`; without a store
it makes a small one. Each trains a Gated SAE of its own from `site.batches(...)`, in the peers' environment with our
packages behind theirs, and must explain more of the variance of held-out rows than it did before.
"""

import argparse
import json
import site as environment
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEER = Path(".venv-peers/bin/python")
BATCH, STEPS, D_SAE = 512, 300, 1024


def main() -> int:
    """Print one JSON line a trainer and the verdict; return 0 when both have learned."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="a store to train from, in place of one made here")
    parser.add_argument("--site", default="mlp.10")
    parser.add_argument("--verbose", action="store_true", help="show what the trainers print")
    parser.add_argument("--packages", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.packages is not None:
        environment.addsitedir(options.packages)
        return in_peers(options)
    if not PEER.exists():
        parser.error(f"{PEER} is not there. Run `make bench-peers` first, from the repository root.")
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or made(Path(folder) / "store", options.site)
        command = [str(PEER), __file__, "--store", str(store), "--site", options.site]
        command += ["--packages", sysconfig.get_path("purelib")]
        return subprocess.run(command, check=False, stderr=None if options.verbose else subprocess.DEVNULL).returncode


def made(root: Path, site: str) -> Path:
    """Write a store of correlated rows."""
    import numpy as np

    from gsae.tests.support.stores import make_store

    draw = np.random.default_rng(0)
    directions = draw.standard_normal((32, 64))

    def rows(count: int, d_in: int) -> Any:
        import ml_dtypes

        strengths = draw.exponential(size=(count, 32)) * (draw.random((count, 32)) < 0.1)
        return (strengths @ directions).astype(ml_dtypes.bfloat16)

    return make_store(root, contexts=400, context_size=512, window_rows=1 << 14, sites={site: 64}, rows=rows).path


def in_peers(options: argparse.Namespace) -> int:
    """Train with both, and print what each reached."""
    import torch

    from gsae.store import open_store

    warnings.simplefilter("ignore")
    store = open_store(options.store)
    x = store.site(options.site, "heldout")[:4096].float()
    met = True
    for name, train in (("dictionary_learning", dictionary_learning), ("saelens", saelens)):
        with store.site(options.site).batches(BATCH, epochs=None) as batches:
            before, after = train(batches, x)
        met &= after > max(before, 0.3)
        print(json.dumps({"trainer": name, "explained_variance_before": before, "after": after}), flush=True)
    print(json.dumps({"bench": "peer_trainers", "met": met, "torch": torch.__version__}))
    return 0 if met else 1


def explained(x: Any, forward: Callable[[Any], Any]) -> float:
    """Return the explained variance of a reconstruction of x (rows, d_in)."""
    import torch

    with torch.no_grad():
        return float(1 - (x - forward(x)).square().sum() / (x - x.mean(0)).square().sum())


def dictionary_learning(batches: Any, x: Any) -> tuple[float, float]:
    """Train a Gated SAE with `trainSAE`; return the explained variance before and after."""
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.training import trainSAE

    trainers: list[Any] = []

    class Kept(GatedSAETrainer):  # trainSAE gives back nothing: the SAE is taken from the trainer that it makes
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            trainers.append((self, explained(x, self.ae)))

    config = {
        "trainer": Kept,
        "steps": STEPS,
        "activation_dim": x.shape[1],
        "dict_size": D_SAE,
        "layer": 10,
        "lm_name": "smollm2",
        "lr": 1e-3,
        "l1_penalty": 0.01,
        "warmup_steps": 10,
        "sparsity_warmup_steps": None,
        "device": "cpu",
        "seed": 0,
    }
    trainSAE(batches, [config], STEPS, normalize_activations=True, device="cpu")
    trainer, before = trainers[0]
    return before, explained(x, trainer.ae)


def saelens(batches: Any, x: Any) -> tuple[float, float]:
    """Train a Gated SAE with `SAETrainer`; return the explained variance before and after."""
    from sae_lens import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = GatedTrainingSAE(
        GatedTrainingSAEConfig(
            d_in=x.shape[1], d_sae=D_SAE, l1_coefficient=0.1, normalize_activations="expected_average_only_in"
        )
    )
    config = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-3,
        n_batches_for_norm_estimate=20,
        logger=LoggingConfig(log_to_wandb=False),
    )
    before = explained(x, sae)
    trained = SAETrainer(config, sae, batches).fit()
    return before, explained(x, trained)


if __name__ == "__main__":
    sys.exit(main())
