"""Opening a store and reading it: sites, their rows in shuffled batches or in stored order, tokens and documents.

Everything that is read was named, sized and summed by the manifest, which was checked when the store was opened.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsae.errors import GsaeError, IncompatibleError, NotFoundError
from gsae.store.codec.chunks import ArraySpec
from gsae.store.format.arrays import SOURCE, context_arrays, site_array
from gsae.store.format.manifest import (
    MANIFEST,
    PLAN,
    RECORDS,
    FileEntry,
    Manifest,
    all_windows,
    every_file,
    moments_of,
    read_manifest,
    record_name,
)
from gsae.store.format.moments import Moments
from gsae.store.format.plan import Plan, SiteSpec, parse
from gsae.store.format.row_order import Ints, Split
from gsae.store.places.cache import Cache, Cached
from gsae.store.places.folder import Folder, Place, Readable
from gsae.store.places.object_store import is_url
from gsae.store.places.pending_tokens import read_tokens
from gsae.store.places.shard import IO, Shard
from gsae.store.write.contexts_writer import read_context_array

from .batches import default_threads
from .decoding import ShardFile
from .row_lookup import Whereabouts, around
from .site import Site
from .take_rows import take


def is_complete(root: Path) -> bool:
    """Whether a finished store stands at `root`."""
    return (root / MANIFEST).exists()


def open_store(path: str | Path, cache: Cache | None = None) -> "Store":
    """Open a complete store, in a folder or at a URL; of a remote one each file is fetched to `cache` when it is read.

    Raises NotFoundError where there is none or the site's files are missing, IncompatibleError when its format is
    newer or its harvest unfinished, CorruptError when its manifest was changed, RemoteError when a server is away.
    """
    where = Cached(str(path), cache or Cache.from_environment()) if is_url(path) else Folder(Path(path))
    return Store(where, find_manifest(where)[0])


def find_manifest(where: Place) -> tuple[Manifest, bytes]:
    """Return the manifest of the complete store at `where`, and its bytes; raises as `open_store`."""
    try:
        data = where.read(MANIFEST)
    except NotFoundError:
        raise _absence(where) from None
    return read_manifest(data, f"{where.name}/{MANIFEST}"), data


def _absence(where: Place) -> GsaeError:
    try:
        plan = parse(Plan, where.read(PLAN), f"{where.name}/{PLAN}")
    except NotFoundError:
        if read_tokens(where)[0] is not None:
            return IncompatibleError(f"{where.name} has only its tokens by now. Run its `gsae harvest` command.")
        return NotFoundError(f"{where.name} is no gsae store: it has no {MANIFEST} and no {PLAN}.")
    there, every = len(recorded(where, plan)), plan.windows + plan.heldout_windows
    return IncompatibleError(
        f"The harvest of {where.name} is not finished: {there} of {every} windows are there. Run its `gsae harvest` "
        "(or `gsae copy`) command again; it goes on where it stopped."
    )


def recorded(where: Place, plan: Plan) -> list[tuple[Split, int]]:
    """List the windows that have a record at `where`."""
    found = where.children(RECORDS)[1]
    return [(split, w) for split, w in all_windows(plan) if record_name(split, w) in found]


@dataclass(frozen=True)
class Store:
    """A complete store: its manifest, its sites, its tokens; `place` is the folder or the URL that it stands at."""

    place: Readable
    manifest: Manifest

    @property
    def name(self) -> str:
        """The folder or URL, as messages have it."""
        return self.place.name

    @property
    def path(self) -> Path:
        """The folder; of a remote store nothing is there."""
        return Path(self.place.name)

    @property
    def locations(self) -> tuple[str, ...]:
        """Where to open it again, from anywhere on this machine: its absolute folder, or its URL."""
        return (self.name if is_url(self.name) else str(Path(self.name).absolute()),)

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
        return sum(f.size for f in every_file(self.manifest))

    def site(self, name: str, split: Split = "train", io: IO = "mmap") -> Site:
        """Return a site's rows in a split; raises NotFoundError listing the sites there are."""
        for spec in self.plan.sites:
            if spec.name == name:
                return Site(self, spec, split, io)
        have = ", ".join(s.name for s in self.plan.sites)
        raise NotFoundError(f"Site {name!r} is not in {self.name}. It has: {have}.")

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

    @property
    def sealed(self) -> bool:
        """Whether it was published without all the windows of its plan."""
        return self.manifest.sealed

    def windows(self, split: Split) -> list[int]:
        """Return the numbers of a split's windows; those of a sealed store may have gaps."""
        return [w.window for w in self.manifest.windows if w.split == split]

    def array_files(self, spec: ArraySpec, split: Split) -> list[int]:
        """Return the sizes of an array's shard files, in the order of `windows`."""
        return [
            a.file.size for w in self.manifest.windows if w.split == split for a in w.arrays if a.array == spec.path
        ]

    def shard(self, spec: ArraySpec, window: int, io: IO = "mmap") -> Shard:
        """Open the file of a window, fetching it first where the store is remote; raises as `Shard` does."""
        entry = self._entries[spec.file(window)]
        return Shard(self.path, spec, window, entry.size, io, self.place.open(entry))

    def files(self, site: str, split: Split, io: IO) -> tuple[ShardFile, ...]:
        """Return the windows of a site."""
        return self._windows(self.array(self.site(site).spec, split), split, io)

    def source_files(self, split: Split, io: IO) -> tuple[tuple[ShardFile, int], ...]:
        """Return the windows of the sources, each with what is to be added to it: nothing."""
        return tuple((file, 0) for file in self._windows(site_array(self.plan, split, SOURCE), split, io))

    def moments(self, site: str, split: Split) -> Moments:
        """Return the float64 moments of a site's rows."""
        return moments_of(self.manifest, split, site, self.site(site).d_in)

    def sources(self, contexts: Ints, positions: Ints) -> Ints:
        """Return context * context_size + position of each token; raises NotFoundError for no position of a context."""
        outside = (positions < 0) | (positions >= self.plan.context_size)
        if outside.any():
            raise NotFoundError(f"Contexts of {self.name} have no position {positions[outside][0]}.")
        return contexts * self.plan.context_size + positions

    def rows_of(self, sources: Ints, split: Split) -> Ints:
        """Return the row number of each source; the first call reads all tokens. Raises NotFoundError for no row."""
        if split not in self._orders:
            windows = self.windows(split)
            self._orders[split] = Whereabouts.of(self.plan, self.tokens(), self.split(), split, windows)
        return self._orders[split].rows(sources)

    def tokens_around(self, sources: ArrayLike, before: int = 8, after: int = 8) -> NDArray[np.int32]:
        """Return the token ids about each source, (n, before + 1 + after): its own at `before`, -1 beyond its context.

        Reads the chunks of tokens that hold them, not all. Raises NotFoundError for no token of the store.
        """
        context, position = np.divmod(np.atleast_1d(np.asarray(sources, np.int64)), self.plan.context_size)
        if len(context) and (context.min() < 0 or context.max() >= self.plan.contexts.contexts):
            raise NotFoundError(f"{self.name} has {self.plan.contexts.contexts} contexts; a source lies outside.")
        c = self.plan.contexts
        spec = next(s for s in context_arrays(c.contexts, c.context_size, c.documents) if s.path == "contexts/tokens")
        files = [ShardFile(self, spec, shard, "pread") for shard in range(spec.shards)]
        return around(take(files, context, default_threads()).view(np.int32), position, before, after)

    @cached_property
    def _orders(self) -> dict[Split, Whereabouts]:
        return {}

    def _windows(self, spec: ArraySpec, split: Split, io: IO) -> tuple[ShardFile, ...]:
        return tuple(ShardFile(self, spec, window, io) for window in self.windows(split))

    @cached_property
    def _entries(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in every_file(self.manifest)}

    def _context_array(self, path: str) -> NDArray[Any]:
        return read_context_array(self.path, self.plan.contexts, path, lambda s, i: self.shard(s, i, "pread"))
