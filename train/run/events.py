"""What a training run reports to its listener: small values, for a progress bar, a log or a test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Started:
    """Some groups start, or resume after `step` batches. `rows` are those of one epoch, within the norm limit.

    later: groups that this process trains after these, because all of them do not fit in memory.
    """

    step: int
    steps: int
    saes: tuple[str, ...]
    groups: int
    later: int
    rows: int
    rows_skipped: int  # over the norm limit or not finite
    rows_nonfinite: int
    epochs: float  # of the whole run
    device: str
    threads: int
    ranks: int


@dataclass(frozen=True)
class Moved:
    """The run goes on with other versions or on another processor, so its last bits may differ. changed: in words."""

    changed: str


@dataclass(frozen=True)
class Progress:
    """`metrics`: the lines just added to metrics.jsonl (`MetricsLine`). Rates are since the last such event."""

    step: int
    steps: int
    rows: int
    rows_per_second: float
    wait_share: float  # share of the time spent waiting for data
    metrics: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Diverged:
    """One SAE diverged at `step`; the others continue.

    action: "stop", "retry" or "continue". back_to: the step of the healthy weights that it goes back to, 0 for none.
    """

    step: int
    sae: str
    because: str
    action: str
    back_to: int


@dataclass(frozen=True)
class Resampled:
    """After `step`, some latents of an SAE that no longer fired got new directions."""

    step: int
    sae: str
    latents: int


@dataclass(frozen=True)
class Checkpointed:
    """Everything that a resume after `step` needs is on disk. On a GPU the run has gone on meanwhile."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The run is complete; `already`: it was before this call. `stopped`: SAEs that diverged and were stopped."""

    step: int
    already: bool
    stopped: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """There is no group left to take; other processes still train this many."""

    groups: int


Event = Started | Moved | Progress | Diverged | Resampled | Checkpointed | Finished | Left
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Do nothing."""
