"""The rows of a site: in shuffled batches, in stored order, by number or by token, from one store or several.

A site needs only the methods of `Library`, which a store and a set of stores both have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

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

from .batch_memory import as_tensor
from .batches import Batches
from .batches_copied import CopiedBatches
from .batches_cuda import CudaBatches
from .read_order import Position
from .reading import Reading, ReadOptions, default_threads
from .shard_file import ShardFile
from .take_rows import Index, resolve_index, take


class Library(Protocol):
    """A store, or several as one. A source is a flat index into the tokens: context * context_size + position."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    @property
    def locations(self) -> tuple[str, ...]:
        """The folder or URL of each store, to open it again."""

    @property
    def plan(self) -> Plan:
        """The plan of the store, or of the first one."""

    @property
    def digest(self) -> str:
        """The identity of its content."""

    def files(self, site: str, split: Split, io: IO) -> tuple[ShardFile, ...]:
        """Return the files of a site, one for each window."""

    def source_files(self, split: Split, io: IO) -> tuple[tuple[ShardFile, int], ...]:
        """Return the files of the sources, each with the number to add to its sources."""

    def moments(self, site: str, split: Split) -> Moments:
        """Return the moments of a site's rows."""

    def sources(self, contexts: Ints, positions: Ints) -> Ints:
        """Return the source of each token. Raises NotFoundError for a position outside its context."""

    def row_numbers(self, sources: Ints, split: Split) -> Ints:
        """Return the row number of each source. Raises NotFoundError for a token that is not a row."""

    def tokens_around(self, sources: ArrayLike, before: int, after: int) -> NDArray[np.int32]:
        """Return the tokens around each source."""


@dataclass(frozen=True)
class Site:
    """The rows of one site in one split; row i of every site of a store is the same token."""

    store: Library
    spec: SiteSpec
    split: Split
    io: IO

    @property
    def name(self) -> str:
        """Its name, for instance `mlp.10`."""
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
        """Bytes of the rows before encoding."""
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
        device: str | torch.device = "cpu",
        state: Position | None = None,
        **options: Any,
    ) -> Batches:
        """Return shuffled batches (batch_size, d_in), every row once an epoch, in another order each epoch.

        Parameters
        ----------
        batch_size : int
            Rows of a batch. The last batch may be shorter.
        device : str or torch.device
            `cpu`, a CUDA device (the next batch is copied while the current one is used), or another device such as
            `mps` (each batch is copied when it is taken).
        state : dict, optional
            A `state_dict()` of batches with the same arguments: the same remaining batches follow, bit for bit.
        **options
            The other fields of `ReadOptions`: `seed` (0), `epochs` (1; None for no end), `max_norm_multiple` (0; rows
            of at least this many median norms are left out), `mix` (32 chunks permuted together), `open_windows`
            (32), `threads` (None for up to four).

        Raises
        ------
        UsageError
            For an option that cannot work, or if no row is left.
        """
        reading = self._reading(ReadOptions(batch_size, **options))
        target = torch.device(device)
        if target.type == "cpu":
            return Batches(reading, state)
        if target.type == "cuda":
            return CudaBatches(reading, state, target)
        return CopiedBatches(reading, state, target)

    def _reading(self, options: ReadOptions) -> Reading:
        if not self.rows:
            raise UsageError(f"Site {self.name!r} of {self.store.name} has no {self.split} rows.")
        summary = self.moments.within(options.max_norm_multiple)
        if not summary.rows:
            raise UsageError(
                f"No row of site {self.name!r} lies below {options.max_norm_multiple} times the median norm."
            )
        return Reading(self._files, options, summary.squared_norm_limit if summary.skipped else None)

    def in_order(self, batch_size: int = 4096) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yield (sources (b,), rows (b, d_in)) in stored order, every row once; a batch ends at the end of a window."""
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
        """Return rows by number in the given order: (d_in,) for an integer, else (n, d_in). Raises IndexError.

        rows: an integer, a slice, or an array or tensor of integers; negative ones count from the end.
        """
        numbers = resolve_index(rows, self.rows)
        found = as_tensor(take(self._files, numbers, default_threads()), self._files[0].spec.dtype)
        single = not isinstance(rows, slice) and np.ndim(rows) == 0
        return found[0] if single else found

    def sources(self, rows: Index) -> NDArray[np.int64]:
        """Return the source of each row, (n,): context * context_size + position, a flat index into the tokens."""
        numbers = resolve_index(rows, self.rows)
        origins = self.store.source_files(self.split, self.io)
        files: Sequence[ShardFile] = [file for file, _ in origins]
        offsets = np.repeat([offset for _, offset in origins], [file.rows for file in files])
        found: NDArray[np.int64] = take(files, numbers, default_threads())[:, 0].view(np.int64) + offsets[numbers]
        return found

    def at(self, contexts: ArrayLike, positions: ArrayLike) -> Tensor:
        """Return the rows (n, d_in) of tokens. contexts, positions: numbers, or arrays that broadcast.

        The first call reads all tokens. Raises NotFoundError for a token that is not a row of this split.
        """
        context, position = np.broadcast_arrays(np.atleast_1d(contexts), np.atleast_1d(positions))
        sources = self.store.sources(context.astype(np.int64), position.astype(np.int64))
        return self[self.store.row_numbers(sources, self.split)]

    def tokens_around(self, rows: Index, before: int = 8, after: int = 8) -> NDArray[np.int32]:
        """Return the token ids around each row, (n, before + 1 + after): its own at `before`, -1 outside."""
        return self.store.tokens_around(self.sources(rows), before, after)
