"""What an evaluation or a search for features reports while it runs, so that a command can show its progress."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """How far a stage has come: `done` of `total` rows, contexts or latents.

    sae: the SAE's name in stages that run once for each SAE, else None.
    """

    stage: Literal["norms", "rows", "contexts", "activations", "latents", "export"]
    done: int
    total: int
    sae: str | None = None


Listen = Callable[[Progress], None]


def ignore(event: Progress) -> None:
    """Do nothing: the listener of a caller that shows no progress."""
