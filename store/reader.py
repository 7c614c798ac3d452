"""Opening a store and reading it: sites, their rows in shuffled batches or in stored order, tokens and documents.

Everything that is read was named, sized and summed by the manifest, which was checked when the store was opened.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arrays import SOURCE, rows_of, site_array, windows_of
from .batches import Batches, GroupReader, Shuffle, as_tensor, check_position, default_threads, groups
from .chunks import NUMPY_DTYPES, ArraySpec
from .contexts import read_context_array
from .errors import IncompatibleError, NotFoundError, UsageError
from .manifest import MANIFEST, Manifest, moments_of, read_manifest
from .mapped import IO, Shard
from .moments import Moments
from .order import Split
from .plan import Plan, SiteSpec
from .publish import read_file
from .writer import read_plan, unfinished


def is_complete(root: Path) -> bool:
    """Whether a finished store stands at `root`."""
    return (root / MANIFEST).exists()


def open_store(path: str | Path) -> "Store":
    """Open a complete store.

    Raises NotFoundError where there is none or the site's files are missing, IncompatibleError when its format is
    newer or its harvest unfinished, CorruptError when its manifest was changed.
    """
    root = Path(path)
    if not is_complete(root):
        _explain_absence(root)
    return Store(root, read_manifest(read_file(root / MANIFEST), str(root / MANIFEST)))


def _explain_absence(root: Path) -> None:
    plan = read_plan(root) if root.is_dir() else None
    if plan is None:
        raise NotFoundError(f"{root} is no gsae store: it has no {MANIFEST} and no plan.json.")
    left, every = len(unfinished(root, plan)), plan.windows + plan.heldout_windows
    raise IncompatibleError(
        f"The harvest of {root} is not finished: {every - left} of {every} windows are there. Run its `gsae harvest` "
        "command again; it goes on where it stopped."
    )


@dataclass(frozen=True)
class Store:
    """A complete store: its manifest, its sites, its tokens."""

    path: Path
    manifest: Manifest

    @property
    def plan(self) -> Plan:
        """What the store was made from."""
        return self.manifest.plan

    @property
    def digest(self) -> str:
        """The identity of its content, 64 hex digits; it does not depend on the codec."""
        return self.manifest.digest

    @property
    def bytes(self) -> int:
        """Bytes of all its files, the manifest left out."""
        windows = sum(a.file.size for w in self.manifest.windows for a in w.arrays)
        records = sum(w.record.size for w in self.manifest.windows)
        return windows + records + sum(f.size for f in self.manifest.files)

    def site(self, name: str, split: Split = "train", io: IO = "mmap") -> "Site":
        """Return a site's rows in a split; raises NotFoundError listing the sites there are."""
        for spec in self.plan.sites:
            if spec.name == name:
                return Site(self, spec, split, io)
        have = ", ".join(s.name for s in self.plan.sites)
        raise NotFoundError(f"Site {name!r} is not in {self.path}. It has: {have}.")

    def tokens(self) -> NDArray[np.int32]:
        """Return the token ids of all contexts, (contexts, context_size), in source order."""
        return self._context_array("contexts/tokens")

    def split(self) -> NDArray[np.uint8]:
        """Return the split of each context, (contexts,): 0 train, 1 held out."""
        return self._context_array("contexts/split")

    def documents(self) -> dict[str, NDArray[Any]]:
        """Return for each document its `start` (flat index of its first token), `id` (in the source) and `split`."""
        return {name: self._context_array(f"documents/{name}") for name in ("start", "id", "split")}

    def array(self, site: SiteSpec, split: Split) -> ArraySpec:
        """Return the array that holds a site's rows in a split."""
        return site_array(self.plan, split, site.folder)

    def array_files(self, spec: ArraySpec, split: Split) -> list[int]:
        """Return the sizes of an array's shard files, in window order."""
        return [
            a.file.size for w in self.manifest.windows if w.split == split for a in w.arrays if a.array == spec.path
        ]

    def _context_array(self, path: str) -> NDArray[Any]:
        sizes = {f.path: f.size for f in self.manifest.files}
        return read_context_array(self.path, self.plan.contexts, path, sizes)


@dataclass(frozen=True)
class Site:
    """The rows of one site in one split; row i of every site of a store is the same token."""

    store: Store
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

    @property
    def rows(self) -> int:
        """Number of rows."""
        return rows_of(self.store.plan, self.split)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the batches."""
        kind: torch.dtype = getattr(torch, self.store.plan.model.dtype)
        return kind

    @cached_property
    def moments(self) -> Moments:
        """Float64 moments of the rows, from the manifest."""
        return moments_of(self.store.manifest, self.split, self.name, self.d_in)

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
        state: dict[str, int] | None = None,
    ) -> Batches:
        """Return shuffled batches (batch_size, d_in), every row once an epoch, another order each epoch.

        epochs: None for no end. max_norm_multiple: leave out the rows that `moments.within` leaves out (0 keeps all
        finite rows). mix: chunks mixed at a time. state: a `state_dict()` to continue from: with the same arguments
        the same batches follow, bit for bit. Raises UsageError for values that cannot work.
        """
        if min(batch_size, mix, open_windows) < 1 or (epochs is not None and epochs < 1):
            raise UsageError("batch_size, mix, open_windows and epochs must each be at least 1.")
        if not self.rows:
            raise UsageError(f"Site {self.name!r} of {self.store.path} has no {self.split} rows.")
        summary = self.moments.within(max_norm_multiple)
        if not summary.rows:
            raise UsageError(f"No row of site {self.name!r} lies below {max_norm_multiple} times the median norm.")
        spec = self.store.array(self.spec, self.split)
        shuffle = Shuffle(seed, mix, open_windows)
        chunks = [-(-spec.rows_of_shard(w) // spec.chunk_rows) for w in range(spec.shards)]
        coming = groups(chunks, shuffle, epochs, check_position(state))
        limit = summary.squared_norm_limit if summary.skipped else None
        reader = GroupReader(
            self.store.path,
            spec,
            self.store.array_files(spec, self.split),
            shuffle,
            limit,
            threads or default_threads(),
            self.io,
        )
        return Batches(reader, coming, batch_size, state)

    def in_order(self, batch_size: int = 4096) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yield (sources (b,), rows (b, d_in)) in stored order, every row once.

        A source is context * context_size + position. Batches end at a window's end.
        """
        plan = self.store.plan
        rows_spec = self.store.array(self.spec, self.split)
        source_spec = site_array(plan, self.split, SOURCE)
        sizes, source_sizes = (self.store.array_files(s, self.split) for s in (rows_spec, source_spec))
        for window in range(windows_of(plan, self.split)):
            with (
                Shard(self.store.path, rows_spec, window, sizes[window], self.io) as rows,
                Shard(self.store.path, source_spec, window, source_sizes[window], self.io) as sources,
            ):
                values, origin = rows.read(), sources.read()[:, 0].view(np.int64)
            for first in range(0, len(values), batch_size):
                part = slice(first, first + batch_size)
                yield origin[part], as_tensor(values[part], rows_spec.dtype)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the rows without any encoding."""
        return self.rows * self.d_in * NUMPY_DTYPES[self.store.plan.model.dtype].itemsize
