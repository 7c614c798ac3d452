"""What a training run tells whoever listens: small values with the figures, for a progress bar, a log or a test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Started:
    """Some groups are begun, or gone on with after `step` batches; rows are those of one epoch, within the limit."""

    step: int
    steps: int
    saes: tuple[str, ...]
    groups: int
    rows: int
    rows_skipped: int  # over the norm limit, or not finite
    rows_nonfinite: int
    epochs: float  # over the whole run
    device: str
    threads: int
    ranks: int


@dataclass(frozen=True)
class Progress:
    """`metrics` are the lines just added to metrics.jsonl; rates and shares are of the time since the last event."""

    step: int
    steps: int
    rows: int
    rows_per_second: float
    wait_share: float  # of the time, spent waiting for data
    metrics: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Stopped:
    """The loss of one SAE was not finite at `step`; it keeps its weights of before and the others go on."""

    step: int
    sae: str


@dataclass(frozen=True)
class Resampled:
    """After `step`, some latents of an SAE that were silent for long got new directions."""

    step: int
    sae: str
    latents: int


@dataclass(frozen=True)
class Checkpointed:
    """All that a resume needs is on disk."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The run is complete; `already` when it was so before this call. `stopped` SAEs were not saved."""

    step: int
    already: bool
    stopped: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """Nothing is left to take, and other processes still train this many groups."""

    groups: int


Event = Started | Progress | Stopped | Resampled | Checkpointed | Finished | Left
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""
