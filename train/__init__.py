"""Gated and baseline SAEs fitted from a store: the paper's formulas, a fast exact step, sweeps, resumable runs.

Needs the store and nothing of the language model: neither transformers nor datasets is imported here.
"""

from .checkpoint import replace_file
from .config import RunConfig, SAEConfig, load_sweep, parse_sae
from .describe import describe_run, stores_of
from .estimate import estimate
from .events import Checkpointed, Event, Finished, Left, Progress, Resampled, Started, Stopped
from .firing import Firing
from .folder import read_config
from .gated import GatedParams
from .params import Params
from .ranks import Ranks
from .relu import ReluParams
from .saved import SAE, load_sae, weights_sha256
from .trainer import train

__all__ = [
    "SAE",
    "Checkpointed",
    "Event",
    "Finished",
    "Firing",
    "GatedParams",
    "Left",
    "Params",
    "Progress",
    "Ranks",
    "ReluParams",
    "Resampled",
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
    "replace_file",
    "stores_of",
    "train",
    "weights_sha256",
]
