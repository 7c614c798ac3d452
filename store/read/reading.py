"""What a stream of batches follows from: the options of the reader, and with the files everything else.

The memory of a stream is two mixes and three batches, whatever the size of the store; it is known before reading.
"""

import os
from dataclasses import dataclass

from gsae.errors import UsageError

from .batch_memory import KEPT, Slots, slots_needed
from .read_order import Shuffle, mix_sizes
from .shard_file import ShardFile


@dataclass(frozen=True)
class ReadOptions:
    """How a site is read. Raises UsageError for a value below 1 where at least 1 is needed.

    batch_size: rows of a batch. seed: of the order. epochs: None for no end. max_norm_multiple: rows of this many
    times the median norm or more are left out; 0 keeps all finite rows. mix: chunks that are decoded and permuted
    together. open_windows: windows from which chunks are drawn. threads: those that decode; None for up to four.
    """

    batch_size: int
    seed: int = 0
    epochs: int | None = 1
    max_norm_multiple: float = 0.0
    mix: int = 32
    open_windows: int = 32
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "mix", "open_windows", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1; got {value}.")

    @property
    def shuffle(self) -> Shuffle:
        """What the order of rows depends on."""
        return Shuffle(self.seed, self.mix, self.open_windows)


@dataclass(frozen=True)
class Reading:
    """Everything that determines a stream of batches.

    files: one for each window. squared_norm_limit: rows with ||x||^2 at or over it, or with a NaN, are left out; None
    keeps all rows without looking at them. pinned: batches are in page-locked memory, for copies to a GPU.
    """

    files: tuple[ShardFile, ...]
    options: ReadOptions
    squared_norm_limit: float | None
    pinned: bool = False

    @property
    def threads(self) -> int:
        """Threads that decode."""
        return self.options.threads or default_threads()

    @property
    def batch_rows(self) -> int:
        """Rows of a batch, or all rows of the stream if these are fewer."""
        size, epochs = self.options.batch_size, self.options.epochs
        return size if epochs is None else min(size, epochs * self._rows)

    @property
    def mix_rows(self) -> int:
        """Rows of the largest mix."""
        largest = max(min(file.spec.chunk_rows, file.rows) for file in self.files)
        chunks = max(mix_sizes(sum(file.chunks for file in self.files), self.options.mix))
        return min(chunks * largest, self._rows)

    @property
    def memory(self) -> int:
        """Bytes that reading takes, without the maps of files."""
        return self._slots * self.batch_rows * self.files[0].spec.row_bytes

    def take_slots(self) -> Slots:
        """Allocate the memory. Raises SpaceError."""
        spec = self.files[0].spec
        return Slots(self._slots, self.batch_rows, spec.width, spec.dtype, KEPT, self.pinned)

    @property
    def _slots(self) -> int:
        return slots_needed(self.mix_rows, self.batch_rows, KEPT)

    @property
    def _rows(self) -> int:
        return sum(file.rows for file in self.files)


def default_threads() -> int:
    """Return the number of threads that decode by default."""
    return min(4, os.cpu_count() or 1)
