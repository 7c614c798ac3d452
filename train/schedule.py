"""Rates as functions of the step alone, which counts from 1: a resumed run needs no scheduler's state."""

from .config import RunConfig


def lr_factor(run: RunConfig, step: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then 1, then linearly towards 0 at the run's end."""
    warm_up = min(1.0, step / run.lr_warm_up_steps) if run.lr_warm_up_steps else 1.0
    decay = min(1.0, (run.steps - step + 1) / run.lr_decay_steps) if run.lr_decay_steps else 1.0
    return warm_up * decay


def l1_factor(run: RunConfig, step: int) -> float:
    """Share of the l1_coefficient at a step: linear warm-up, so that latents are not killed before they point."""
    return min(1.0, step / run.l1_warm_up_steps) if run.l1_warm_up_steps else 1.0
