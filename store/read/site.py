"""The rows of a site: in shuffled batches, in stored order, by number, by token; from one store or several.

What a site needs of its store is a few questions (`Library`), so a store and a set of stores answer alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gsae.errors import UsageError
from gsae.store.codec.chunks import NUMPY_DTYPES
from gsae.store.format.moments import Moments
from gsae.store.format.plan import Plan, SiteSpec
from gsae.store.format.row_order import Ints, Split
from gsae.store.places.shard import IO

from .batch_memory import KEPT, as_tensor
from .batches import Batches, Position, Reading, default_threads
from .batches_cuda import CudaBatches
from .decoding import ShardFile
from .read_order import Shuffle
from .shared import Feed, SharedBatches
from .take_rows import Index, numbers, take


class Library(Protocol):
    """A store, or several as one. A source is a flat index into `tokens`: context * context_size + position."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def locations(self) -> tuple[str, ...]:
        """Where to open it, or each of them, again."""

    @property
    def plan(self) -> Plan:
        """What it, or the first store, was made from."""

    @property
    def digest(self) -> str:
        """The identity of its content."""

    def files(self, site: str, split: Split, io: IO) -> tuple[ShardFile, ...]:
        """Return the windows of a site."""

    def source_files(self, split: Split, io: IO) -> tuple[tuple[ShardFile, int], ...]:
        """Return the windows of the sources, each with what is to be added to it."""

    def moments(self, site: str, split: Split) -> Moments:
        """Return the moments of a site's rows."""

    def sources(self, contexts: Ints, positions: Ints) -> Ints:
        """Return the source of each token."""

    def rows_of(self, sources: Ints, split: Split) -> Ints:
        """Return the row number of each source; raises NotFoundError for a token that is no row."""

    def tokens_around(self, sources: ArrayLike, before: int, after: int) -> NDArray[np.int32]:
        """Return the tokens about each source."""


@dataclass(frozen=True)
class Site:
    """The rows of one site in one split; row i of every site of a store is the same token."""

    store: Library
    spec: SiteSpec
    split: Split
    io: IO

    @property
    def name(self) -> str:
        """For instance `mlp.10`."""
        return self.spec.name

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.spec.d_in

    @cached_property
    def rows(self) -> int:
        """Number of rows."""
        return sum(file.rows for file in self._files)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the batches."""
        kind: torch.dtype = getattr(torch, self.store.plan.model.dtype)
        return kind

    @property
    def raw_bytes(self) -> int:
        """Bytes of the rows without any encoding."""
        return self.rows * self.d_in * NUMPY_DTYPES[self.store.plan.model.dtype].itemsize

    @cached_property
    def moments(self) -> Moments:
        """Float64 moments of the rows, from the manifest."""
        return self.store.moments(self.name, self.split)

    @cached_property
    def _files(self) -> tuple[ShardFile, ...]:
        return self.store.files(self.name, self.split, self.io)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epochs: int | None = 1,
        max_norm_multiple: float = 0.0,
        mix: int = 32,
        open_windows: int = 32,
        threads: int | None = None,
        device: str | torch.device = "cpu",
        state: Position | None = None,
    ) -> Batches:
        """Return shuffled batches (batch_size, d_in), every row once an epoch, another order each epoch.

        epochs: None for no end. max_norm_multiple: leave out the rows that `moments.within` leaves out (0 keeps all
        finite rows). mix: chunks mixed at a time. device: `cpu`, or a CUDA device to which batches are copied while
        the one before is used. state: a `state_dict()` to continue from: with the same arguments the same batches
        follow, bit for bit. Raises UsageError for values that cannot work.
        """
        reading = self._reading(batch_size, seed, epochs, max_norm_multiple, mix, open_windows, threads, KEPT)
        place = torch.device(device)
        if place.type == "cpu":
            return Batches(reading, state)
        if place.type != "cuda":
            raise UsageError(f"Batches go to the CPU or to a CUDA device, not to {place}.")
        return CudaBatches(reading, state, place)

    def shared_batches(
        self,
        consumers: int,
        batch_size: int,
        *,
        lead: int = 16,
        seed: int = 0,
        epochs: int | None = 1,
        max_norm_multiple: float = 0.0,
        mix: int = 32,
        open_windows: int = 32,
        threads: int | None = None,
        state: Position | None = None,
    ) -> tuple[SharedBatches, ...]:
        """Return one iterator a consumer over the same batches, decoded once; each is for a thread of its own.

        lead: how many batches the fastest may be ahead of the slowest. A batch is the same memory for all. All else
        is as for `batches`; a state continues all of them.
        """
        if min(consumers, lead) < 1:
            raise UsageError("consumers and lead must each be at least 1.")
        kept = KEPT + lead
        reading = self._reading(batch_size, seed, epochs, max_norm_multiple, mix, open_windows, threads, kept)
        feed = Feed(Batches(reading, state), consumers, lead)
        return tuple(SharedBatches(feed, consumer) for consumer in range(consumers))

    def _reading(
        self,
        batch_size: int,
        seed: int,
        epochs: int | None,
        max_norm_multiple: float,
        mix: int,
        open_windows: int,
        threads: int | None,
        kept: int,
    ) -> Reading:
        if min(batch_size, mix, open_windows) < 1 or (epochs is not None and epochs < 1):
            raise UsageError("batch_size, mix, open_windows and epochs must each be at least 1.")
        if not self.rows:
            raise UsageError(f"Site {self.name!r} of {self.store.name} has no {self.split} rows.")
        summary = self.moments.within(max_norm_multiple)
        if not summary.rows:
            raise UsageError(f"No row of site {self.name!r} lies below {max_norm_multiple} times the median norm.")
        return Reading(
            files=self._files,
            shuffle=Shuffle(seed, mix, open_windows),
            batch_size=batch_size,
            epochs=epochs,
            squared_norm_limit=summary.squared_norm_limit if summary.skipped else None,
            threads=threads or default_threads(),
            kept=kept,
        )

    def in_order(self, batch_size: int = 4096) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yield (sources (b,), rows (b, d_in)) in stored order, every row once; batches end at a window's end."""
        origins = self.store.source_files(self.split, self.io)
        for file, (source_file, offset) in zip(self._files, origins, strict=True):
            with file.open() as rows, source_file.open() as sources:
                values, origin = rows.read(), sources.read()[:, 0].view(np.int64) + offset
            for first in range(0, len(values), batch_size):
                part = slice(first, first + batch_size)
                yield origin[part], as_tensor(values[part], file.spec.dtype)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: Index) -> Tensor:
        """Return rows by number in the order asked: (d_in,) for an integer, else (n, d_in); raises IndexError.

        rows: an integer, a slice, or an array or tensor of integers; negative ones count from the end.
        """
        asked = numbers(rows, self.rows)
        found = as_tensor(take(self._files, asked, default_threads()), self._files[0].spec.dtype)
        single = not isinstance(rows, slice) and np.ndim(rows) == 0
        return found[0] if single else found

    def sources(self, rows: Index) -> NDArray[np.int64]:
        """Return the source (n,) of each row: context * context_size + position, a flat index into the tokens."""
        asked = numbers(rows, self.rows)
        origins = self.store.source_files(self.split, self.io)
        files: Sequence[ShardFile] = [file for file, _ in origins]
        offsets = np.repeat([offset for _, offset in origins], [file.rows for file in files])
        found: NDArray[np.int64] = take(files, asked, default_threads())[:, 0].view(np.int64) + offsets[asked]
        return found

    def at(self, contexts: ArrayLike, positions: ArrayLike) -> Tensor:
        """Return the rows (n, d_in) of tokens by context and position, which are numbers or arrays that broadcast.

        The first call reads all tokens. Raises NotFoundError for a token that is no row of this split.
        """
        context, position = np.broadcast_arrays(np.atleast_1d(contexts), np.atleast_1d(positions))
        sources = self.store.sources(context.astype(np.int64), position.astype(np.int64))
        return self[self.store.rows_of(sources, self.split)]

    def tokens_around(self, rows: Index, before: int = 8, after: int = 8) -> NDArray[np.int32]:
        """Return the token ids about each row, (n, before + 1 + after): its own at `before`, -1 beyond its context."""
        return self.store.tokens_around(self.sources(rows), before, after)
