"""Rates as functions of the step, which counts from 1, and of the last resampling: no scheduler has a state."""

import math

import torch
from torch import Tensor

from .config import ResolvedRun

RESAMPLED_LR = 0.1  # share of the learning rate right after a resampling


def lr_factor(run: ResolvedRun, step: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then 1, then linearly to 0 at the end of the run."""
    warm_up = min(1.0, step / run.lr_warm_up_steps) if run.lr_warm_up_steps else 1.0
    decay = min(1.0, (run.steps - step + 1) / run.lr_decay_steps) if run.lr_decay_steps else 1.0
    return warm_up * decay


def recovery(run: ResolvedRun, step: int, resampled: Tensor) -> Tensor:
    """Share of the learning rate after a resampling: a tenth, then back to 1 by a cosine (Bricken et al. 2023).

    resampled (saes,): the step after which latents of each SAE were last resampled, -1 for none.
    """
    done = ((step - resampled) / run.resample_warm_up_steps).clamp(max=1.0)
    share = RESAMPLED_LR + (1 - RESAMPLED_LR) * (1 - torch.cos(math.pi * done)) / 2
    return torch.where(resampled < 0, torch.ones_like(share), share)


def l1_factor(run: ResolvedRun, step: int) -> float:
    """Share of the sparsity coefficient at a step: linear warm-up; a full penalty at the start would kill latents."""
    return min(1.0, step / run.l1_warm_up_steps) if run.l1_warm_up_steps else 1.0


def seed_at(seed: int, step: int) -> int:
    """A seed for what is drawn at one step, far from those of other steps."""
    return (seed + 0x9E3779B97F4A7C15 * step) % 2**63
