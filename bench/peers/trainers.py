"""The Gated SAEs of SAELens and dictionary_learning, for bench/train.py: speed and quality, in the peers' venv."""

import argparse
import time
from collections.abc import Iterator
from typing import Any


def scaled_heldout(store: Any, site: str) -> tuple[float, Any]:
    """The scale of a run, and held-out rows within its norm limit, scaled."""
    summary = store.site(site).moments.within(10)
    rows = store.site(site, "heldout")[:8192].float()
    scale = summary.mean_square_norm**-0.5
    return scale, rows[rows.norm(dim=1) < summary.norm_limit] * scale


def figures_of(x: Any, f: Any, x_hat: Any) -> dict[str, float]:
    """L0, explained variance and gamma of reconstructions x_hat of x (rows, d_in)."""
    error, total = (x - x_hat).square().sum(), (x - x.mean(0)).square().sum()
    return {
        "l0": float((f > 0).sum() / len(x)),
        "explained_variance": float(1 - error / total),
        "gamma": float(x_hat.square().sum() / (x_hat * x).sum()),
    }


def from_memory(options: argparse.Namespace) -> list[Any]:
    """Some scaled float32 batches."""
    from gsae.store import open_store

    store = open_store(options.store)
    scale, _ = scaled_heldout(store, options.site)
    with store.site(options.site).batches(options.batch_size, epochs=None, max_norm_multiple=10) as batches:
        return [next(batches).float() * scale for _ in range(8)]


class Timed(Iterator[Any]):
    """Batches from memory, round and round, that know when the first `skipped` of them had been used."""

    def __init__(self, batches: list[Any], skipped: int) -> None:
        self.batches, self.left, self.number = batches, skipped, 0
        self.began = 0.0

    def __next__(self) -> Any:
        if self.left == 0:
            self.began = time.perf_counter()
        self.left -= 1
        self.number += 1
        return self.batches[self.number % len(self.batches)]

    def rate(self, rows: int) -> dict[str, float]:
        """Rows a second since then."""
        return {"rows_per_second": rows / (time.perf_counter() - self.began)}


SKIPPED = 3


def dictionary_learning(options: argparse.Namespace) -> dict[str, float]:
    """`trainSAE` with its Gated trainer, from memory."""
    from dictionary_learning.training import trainSAE

    steps = options.peer_steps + SKIPPED
    batches = Timed(from_memory(options), SKIPPED)
    trainer = gated_trainer([])
    config = settings(trainer, options, steps, seed=0, width=options.width, d_in=batches.batches[0].shape[1])
    trainSAE(batches, [config], steps, device="cpu")
    return batches.rate(options.peer_steps * options.batch_size)


def saelens(options: argparse.Namespace) -> dict[str, float]:
    """`SAETrainer` with its Gated SAE, from memory."""
    from sae_lens import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    batches = Timed(from_memory(options), SKIPPED)
    d_in = batches.batches[0].shape[1]
    sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=d_in, d_sae=options.width, l1_coefficient=options.l1))
    config = SAETrainerConfig(
        total_training_samples=(options.peer_steps + SKIPPED) * options.batch_size,
        train_batch_size_samples=options.batch_size,
        lr=1e-3,
        lr_end=1e-3,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(config, sae, batches).fit()
    return batches.rate(options.peer_steps * options.batch_size)


def gated_trainer(made: list[Any], mean_row: Any = None) -> Any:
    """Their Gated trainer, kept where it can be found, and started from the mean row as ours is."""
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    class Kept(GatedSAETrainer):  # type: ignore[misc]
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            if mean_row is not None:
                self.ae.decoder_bias.data.copy_(mean_row)
            made.append(self)

    return Kept


def settings(trainer: Any, options: argparse.Namespace, steps: int, *, seed: int, width: int, d_in: int) -> Any:
    """Our recipe in their words."""
    warm_up, last = min(100, steps // 2), steps - steps // 5
    return {
        "trainer": trainer,
        "steps": steps,
        "activation_dim": d_in,
        "dict_size": width,
        "layer": 10,
        "lm_name": "smollm2",
        "lr": 1e-3,
        "l1_penalty": options.l1,
        "warmup_steps": warm_up,
        "sparsity_warmup_steps": max(1, steps // 10),
        "decay_start": last if max(warm_up, steps // 10) < last < steps else None,
        "device": "cpu",
        "seed": seed,
    }


def peer_quality(options: argparse.Namespace) -> dict[str, Any]:
    """Figures on held-out rows of their Gated SAE, one a seed, trained on the rows that ours sees, in its order."""
    import torch
    from dictionary_learning.training import trainSAE

    from gsae.store import open_store

    store = open_store(options.store)
    scale, x = scaled_heldout(store, options.site)
    mean_row = torch.from_numpy(store.site(options.site).moments.within(10).mean * scale).float()
    made: list[Any] = []
    steps, d_in = options.quality_steps, x.shape[1]
    configs = [
        settings(gated_trainer(made, mean_row), options, steps, seed=seed, width=options.quality_width, d_in=d_in)
        for seed in range(options.seeds)
    ]
    site = store.site(options.site)
    with site.batches(options.quality_batch_size, epochs=None, max_norm_multiple=10) as batches:
        trainSAE((rows.float() * scale for rows in batches), configs, steps, device="cpu")
    with torch.no_grad():
        return {"figures": [figures_of(x, t.ae.encode(x), t.ae.decode(t.ae.encode(x))) for t in made]}


PEERS = {"saelens": saelens, "dictionary_learning": dictionary_learning, "quality": peer_quality}
