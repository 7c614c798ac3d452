"""What a training run tells whoever listens: small values with the figures, for a progress bar, a log or a test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Started:
    """The run begins, or goes on after `step` batches. Rows are those of one epoch, within the norm limit."""

    step: int
    steps: int
    saes: tuple[str, ...]
    rows: int
    rows_skipped: int
    epochs: float  # over the whole run


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
class Checkpointed:
    """All that a resume needs is on disk."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The run is complete; `already` when it was so before this call. `stopped` SAEs were not saved."""

    step: int
    already: bool
    stopped: tuple[str, ...]


Event = Started | Progress | Stopped | Checkpointed | Finished
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""
