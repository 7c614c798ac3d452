"""Gated and baseline SAEs fitted from a store: the formulas, a fast exact step, sweeps, resumable runs.

Training needs the store only: neither the language model nor the text, so transformers and datasets are not imported.
"""

from .architectures.base import Params
from .architectures.gated import GatedParams
from .architectures.relu import ReluParams
from .run.config import ResolvedRun, RunConfig, SAEConfig
from .run.describe import describe_run, stores_of
from .run.estimate import estimate
from .run.events import Checkpointed, Event, Finished, Left, Progress, Resampled, Started, Stopped
from .run.folder import read_config
from .run.metrics_line import HeldoutMetrics, MetricsLine
from .run.ranks import Ranks
from .run.sweep import load_sweep, parse_sae
from .run.trainer import train
from .sae import SAE, load_sae, weights_sha256
from .sae_metadata import SAEMetadata
from .step.firing import Firing

__all__ = [
    "SAE",
    "Checkpointed",
    "Event",
    "Finished",
    "Firing",
    "GatedParams",
    "HeldoutMetrics",
    "Left",
    "MetricsLine",
    "Params",
    "Progress",
    "Ranks",
    "ReluParams",
    "Resampled",
    "ResolvedRun",
    "RunConfig",
    "SAEConfig",
    "SAEMetadata",
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
    "weights_sha256",
]
