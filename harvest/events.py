"""The events that a harvest reports to its listener: values that a progress bar, a log or a test reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .text.packing import BlockTokenised


@dataclass(frozen=True)
class StageStarted:
    """A step that takes a while has started."""

    name: Literal[
        "reading the text",
        "waiting for another worker's tokens",
        "loading the model",
        "confirming the sites",
        "finding the batch size",
        "running the model",
        "writing the manifest",
    ]


@dataclass(frozen=True)
class BatchDone:
    """The model has run one batch.

    rows: rows made by this call so far, of `total`. tokens: tokens that the model has read in `seconds`, counted from
    the first batch. written, raw: bytes of the windows published so far, as files and as uncompressed rows. busy:
    seconds in which the device ran passes; on a GPU it lags by a batch or two.
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
        """Share of the time in which the device ran no pass."""
        return max(0.0, 1 - self.busy / self.seconds) if self.seconds else 0.0


@dataclass(frozen=True)
class WorkerDone:
    """This worker made `windows` windows and has none left; `missing`, such as `train-00003`, belong to others."""

    windows: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """The store is complete. This call made `windows` of its windows, 0 if the store was complete before."""

    windows: int


@dataclass(frozen=True)
class Noted:
    """Something that a person should know and that does not end the harvest, in one line."""

    text: str


Event = Noted | StageStarted | BlockTokenised | BatchDone | WorkerDone | Finished
Listen = Callable[[Event], None]
