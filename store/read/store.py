"""A complete store, opened for reading: its sites, tokens and documents.

The manifest is checked when the store is opened. It names every file that is read, with its size and sha256.
"""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsae.errors import GsaeError, IncompatibleError, NotFoundError, UsageError
from gsae.store.codec.chunks import ArraySpec
from gsae.store.format.arrays import SOURCE, context_arrays, site_array
from gsae.store.format.json_files import parse
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
from gsae.store.format.plan import Plan, SiteSpec
from gsae.store.format.row_order import Ints, Split
from gsae.store.places.cache import Cache, CachedRemote
from gsae.store.places.folder import Folder
from gsae.store.places.object_store import is_url
from gsae.store.places.pending_tokens import read_tokens
from gsae.store.places.place import Place, Readable
from gsae.store.places.shard import IO, ShardReader

from .contexts_reader import read_context_array
from .main_documents import main_documents
from .reading import default_threads
from .row_lookup import RowLookup, around
from .shard_file import ShardFile
from .site import Site
from .take_rows import take

MAIN_DOCUMENTS_TOKENS = 1 << 20  # read at a time to find the documents of contexts


def is_complete(root: Path) -> bool:
    """Whether `root` holds a complete store."""
    return (root / MANIFEST).exists()


def open_store(path: str | Path, cache: Cache | None = None) -> "Store":
    """Open a complete store in a folder or at a URL. Files of a remote store are fetched to `cache` when they are read.

    Raises NotFoundError if there is no store, IncompatibleError if its format is newer or its harvest is not finished,
    CorruptError if its manifest was changed, RemoteError if a server does not answer.
    """
    where = CachedRemote(str(path), cache or Cache.from_environment()) if is_url(path) else Folder(Path(path))
    return Store(where, find_manifest(where)[0])


def find_manifest(where: Place) -> tuple[Manifest, bytes]:
    """Return the manifest of the complete store at `where`, and its bytes. Raises as `open_store`."""
    try:
        data = where.read(MANIFEST)
    except NotFoundError:
        raise _absence(where) from None
    return read_manifest(data, f"{where.name}/{MANIFEST}"), data


def _absence(where: Place) -> GsaeError:
    """Return the error for a place without a manifest."""
    try:
        plan = parse(Plan, where.read(PLAN), f"{where.name}/{PLAN}")
    except NotFoundError:
        if read_tokens(where)[0] is not None:
            return IncompatibleError(f"{where.name} has only its tokens so far. Run its `gsae harvest` command.")
        return NotFoundError(f"{where.name} is no gsae store: it has no {MANIFEST} and no {PLAN}.")
    finished, planned = len(recorded(where, plan)), plan.windows + plan.heldout_windows
    return IncompatibleError(
        f"The harvest of {where.name} is not finished: {finished} of {planned} windows are there. Run its "
        "`gsae harvest` (or `gsae copy`) command again; it continues where it stopped."
    )


def recorded(where: Place, plan: Plan) -> list[tuple[Split, int]]:
    """List the windows that have a record at `where`."""
    found = where.children(RECORDS)[1]
    return [(split, w) for split, w in all_windows(plan) if record_name(split, w) in found]


class Store:
    """A complete store: its manifest, its sites and its tokens; `place` is the folder or URL of its files."""

    def __init__(self, place: Readable, manifest: Manifest) -> None:
        """Read the store of `manifest` from `place`."""
        self.place = place
        self.manifest = manifest
        self._lookups: dict[Split, RowLookup] = {}

    @property
    def name(self) -> str:
        """The folder or URL, for messages."""
        return self.place.name

    @property
    def path(self) -> Path:
        """The folder of a local store. Raises UsageError for a remote one."""
        if not isinstance(self.place, Folder):
            raise UsageError(f"{self.name} is not a local folder. Copy the store with `gsae copy`.")
        return self.place.root

    @property
    def locations(self) -> tuple[str, ...]:
        """Where to open it again from anywhere on this machine: its absolute folder, or its URL."""
        return (str(self.path.absolute()) if isinstance(self.place, Folder) else self.name,)

    @property
    def plan(self) -> Plan:
        """What the store was made from."""
        return self.manifest.plan

    @property
    def digest(self) -> str:
        """The identity of its content, 64 hex digits; it does not depend on the codec."""
        return self.manifest.digest

    @property
    def sealed(self) -> bool:
        """Whether it was completed without some of the windows of its plan."""
        return self.manifest.sealed

    @property
    def bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(f.size for f in every_file(self.manifest))

    def site(self, name: str, split: Split = "train", io: IO = "mmap") -> Site:
        """Return the rows of a site in a split. Raises NotFoundError, which lists the sites of the store."""
        for spec in self.plan.sites:
            if spec.name == name:
                return Site(self, spec, split, io)
        names = ", ".join(s.name for s in self.plan.sites)
        raise NotFoundError(f"Site {name!r} is not in {self.name}. It has: {names}.")

    def tokens(self) -> NDArray[np.int32]:
        """Return the token ids of all contexts, (contexts, context_size), in source order."""
        return self._context_array("contexts/tokens")

    def split(self) -> NDArray[np.uint8]:
        """Return the split of each context, (contexts,): 0 train, 1 held out."""
        return self._context_array("contexts/split")

    def documents(self) -> dict[str, NDArray[Any]]:
        """Return for each document its `start` (flat index of its first token), `id` (in the source) and `split`."""
        return {name: self._context_array(f"documents/{name}") for name in ("start", "id", "split")}

    def main_documents(self, contexts: Ints) -> Ints:
        """Return for each of these contexts, (n,), the number of the document that most of its tokens are of."""
        if not len(contexts):
            return contexts.copy()
        plan, documents = self.plan, self.documents()
        start, ids, found = documents["start"], documents["id"], []
        step = max(1, MAIN_DOCUMENTS_TOKENS // plan.context_size)
        for first in range(0, len(contexts), step):
            some = contexts[first : first + step]
            tokens = self.tokens_around(some * plan.context_size, 0, plan.context_size - 1)
            found.append(main_documents(some, tokens, plan.tokenizer.excluded_ids, start, ids))
        return np.concatenate(found)

    def array(self, site: SiteSpec, split: Split) -> ArraySpec:
        """Return the array that holds the rows of a site in a split."""
        return site_array(self.plan, split, site.folder)

    def windows(self, split: Split) -> list[int]:
        """Return the numbers of the windows of a split; those of a sealed store may have gaps."""
        return [w.window for w in self.manifest.windows if w.split == split]

    def file_sizes(self, spec: ArraySpec, split: Split) -> list[int]:
        """Return the bytes of each shard file of an array, in the order of `windows`."""
        return [
            a.file.size for w in self.manifest.windows if w.split == split for a in w.arrays if a.array == spec.path
        ]

    def shard(self, spec: ArraySpec, number: int, io: IO = "mmap") -> ShardReader:
        """Open shard `number` of an array; of a remote store it is fetched first. Raises as `ShardFile.open`."""
        return self._file(spec, number, io).open()

    def files(self, site: str, split: Split, io: IO) -> tuple[ShardFile, ...]:
        """Return the files of a site, one for each window."""
        return self._windows(self.array(self.site(site).spec, split), split, io)

    def source_files(self, split: Split, io: IO) -> tuple[tuple[ShardFile, int], ...]:
        """Return the files of the sources, each with the number to add to its sources: 0."""
        return tuple((file, 0) for file in self._windows(site_array(self.plan, split, SOURCE), split, io))

    def moments(self, site: str, split: Split) -> Moments:
        """Return the float64 moments of the rows of a site."""
        return moments_of(self.manifest, split, site, self.site(site).d_in)

    def sources(self, contexts: Ints, positions: Ints) -> Ints:
        """Return context * context_size + position of each token. Raises NotFoundError for a position outside."""
        outside = (positions < 0) | (positions >= self.plan.context_size)
        if outside.any():
            raise NotFoundError(f"Contexts of {self.name} have no position {positions[outside][0]}.")
        return contexts * self.plan.context_size + positions

    def row_numbers(self, sources: Ints, split: Split) -> Ints:
        """Return the row number of each source. The first call reads all tokens. Raises NotFoundError for no row."""
        if split not in self._lookups:
            self._lookups[split] = RowLookup.build(self.plan, self.tokens(), self.split(), split, self.windows(split))
        return self._lookups[split].row_numbers(sources)

    def tokens_around(self, sources: ArrayLike, before: int = 8, after: int = 8) -> NDArray[np.int32]:
        """Return the token ids around each source, (n, before + 1 + after): its own at `before`, -1 outside.

        Only the chunks with these contexts are read. Raises NotFoundError for a source outside the store's tokens.
        """
        context, position = np.divmod(np.atleast_1d(np.asarray(sources, np.int64)), self.plan.context_size)
        if len(context) and (context.min() < 0 or context.max() >= self.plan.contexts.contexts):
            raise NotFoundError(f"{self.name} has {self.plan.contexts.contexts} contexts; a source lies outside.")
        c = self.plan.contexts
        spec = next(s for s in context_arrays(c.contexts, c.context_size, c.documents) if s.path == "contexts/tokens")
        files = [self._file(spec, shard, "pread") for shard in range(spec.shards)]
        return around(take(files, context, default_threads()).view(np.int32), position, before, after)

    def _file(self, spec: ArraySpec, number: int, io: IO) -> ShardFile:
        return ShardFile(self.place, spec, number, self._entries[spec.file(number)], io)

    def _windows(self, spec: ArraySpec, split: Split, io: IO) -> tuple[ShardFile, ...]:
        return tuple(self._file(spec, window, io) for window in self.windows(split))

    @cached_property
    def _entries(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in every_file(self.manifest)}

    def _context_array(self, path: str) -> NDArray[Any]:
        return read_context_array(self.plan.contexts, path, partial(self.shard, io="pread"))
