"""What `gsae.train` exports: one list for its users and for the type checkers.

`__init__` imports this file when a name is first used, because it imports torch. To export a name, add it here.
A name must not equal that of a file of the room: Python would then give the module.
"""

from .architectures.base import Params
from .architectures.gated import GatedParams
from .architectures.relu import ReluParams
from .run.computing import named_device
from .run.config import ResolvedRun, RunConfig, SAEConfig
from .run.describe import describe_run, stores_of
from .run.estimate import estimate
from .run.events import Checkpointed, Diverged, Event, Finished, Left, Moved, Progress, Resampled, Started
from .run.folder import read_config
from .run.metrics_line import HeldoutMetrics, MetricsLine
from .run.ranks import Ranks
from .run.sweep import load_sweep, parse_sae
from .run.trainer import train
from .sae import SAE, load_sae, weights_sha256
from .sae_metadata import SAEMetadata
from .step.firing import Firing
from .step.wide import wide

__all__ = [
    "SAE",
    "Checkpointed",
    "Diverged",
    "Event",
    "Finished",
    "Firing",
    "GatedParams",
    "HeldoutMetrics",
    "Left",
    "MetricsLine",
    "Moved",
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
    "describe_run",
    "estimate",
    "load_sae",
    "load_sweep",
    "named_device",
    "parse_sae",
    "read_config",
    "stores_of",
    "train",
    "weights_sha256",
    "wide",
]
