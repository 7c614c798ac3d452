"""Gated and baseline SAEs fitted from a store: the paper's formulas, a fast exact step, sweeps, resumable runs.

Needs the store and nothing of the language model: neither transformers nor datasets is imported here.
"""

from .config import RunConfig, SAEConfig, load_sweep, parse_sae
from .describe import describe_run, stores_of
from .estimate import estimate
from .events import Checkpointed, Event, Finished, Progress, Started, Stopped
from .folder import read_config
from .sae import SAE, GatedParams, ReluParams, load_sae
from .trainer import train

__all__ = [
    "SAE",
    "Checkpointed",
    "Event",
    "Finished",
    "GatedParams",
    "Progress",
    "ReluParams",
    "RunConfig",
    "SAEConfig",
    "Started",
    "Stopped",
    "describe_run",
    "estimate",
    "load_sae",
    "load_sweep",
    "parse_sae",
    "read_config",
    "stores_of",
    "train",
]
