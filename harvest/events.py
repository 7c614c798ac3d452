"""What a harvest tells its listener: values that a progress bar, a log or a test reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .text.packing import BlockTokenised


@dataclass(frozen=True)
class Stage:
    """The harvest begins something that takes a while."""

    name: Literal[
        "reading the text",
        "waiting for another worker's tokens",
        "loading the model",
        "finding the batch size",
        "running the model",
        "writing the manifest",
    ]


@dataclass(frozen=True)
class Running:
    """The model has run a batch; of the `total` rows that were due when this call began, `rows` are made.

    tokens: that the model has read, in `seconds` since its first batch. written, raw: bytes of the windows that are
    published by now, in files and as plain rows. busy: seconds in which the device ran passes, as far as is known by
    now: on a GPU a batch or two late.
    """

    rows: int
    total: int
    tokens: int
    seconds: float
    written: int
    raw: int
    busy: float

    @property
    def waiting(self) -> float:
        """Share of the time in which the device had no pass to run."""
        return max(0.0, 1 - self.busy / self.seconds) if self.seconds else 0.0


@dataclass(frozen=True)
class Finished:
    """The store is complete; this call made `windows` of its windows: 0 when it was complete before."""

    windows: int


@dataclass(frozen=True)
class Left:
    """This worker is done, having made `windows` windows; those `missing`, as `train-00003`, are other workers'."""

    windows: int
    missing: tuple[str, ...]


Event = Stage | BlockTokenised | Running | Finished | Left
Listen = Callable[[Event], None]
