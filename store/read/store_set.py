"""Several stores read as one: the windows of all stores in one order, moments merged, contexts numbered through.

They must hold the same site of the same model in the same dtype. Windows, chunks and codecs may differ. Nothing is
copied.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsae.errors import IncompatibleError, UsageError
from gsae.store.format.json_files import sha256
from gsae.store.format.moments import Moments
from gsae.store.format.plan import DatasetSource, Plan, SiteSpec
from gsae.store.format.row_order import Ints, Split
from gsae.store.places.shard import IO

from .shard_file import ShardFile
from .site import Site
from .store import Store, open_store


def open_stores(paths: Sequence[str | Path]) -> "Store | StoreSet":
    """Open complete stores as one set; a single one is returned as a `Store`.

    Raises as `open_store`; IncompatibleError for stores of different models, UsageError for a store given twice.
    """
    stores = tuple(open_store(path) for path in paths)
    if not stores:
        raise UsageError("No store was given.")
    return stores[0] if len(stores) == 1 else StoreSet(stores)


@dataclass(frozen=True)
class StoreSet:
    """Stores read as one. `plan` is that of the first; the others may have other windows, chunks and codecs."""

    stores: tuple[Store, ...]

    def __post_init__(self) -> None:
        first = self.stores[0]
        for other in self.stores[1:]:
            _require_equal(first, other, "model revision", lambda s: s.plan.model.revision)
            _require_equal(first, other, "hash of the model's weights", lambda s: s.plan.model.weights_sha256)
            _require_equal(first, other, "code of the model", lambda s: s.plan.model.code)
            _require_equal(first, other, "quantisation of the model", lambda s: s.plan.model.quantization)
            _require_equal(first, other, "dtype", lambda s: s.plan.model.dtype)
        if len({store.digest for store in self.stores}) < len(self.stores):
            raise UsageError(f"One store is given twice in {self.name}: its rows would be read twice.")

    @property
    def name(self) -> str:
        """The folders or URLs, for messages."""
        return ", ".join(store.name for store in self.stores)

    @property
    def locations(self) -> tuple[str, ...]:
        """The folders or URLs, to open the stores again."""
        return tuple(place for store in self.stores for place in store.locations)

    @property
    def plan(self) -> Plan:
        """The plan of the first store."""
        return self.stores[0].plan

    @property
    def digest(self) -> str:
        """The sha256 of the hex digests of the stores, joined in their order."""
        return sha256("".join(store.digest for store in self.stores).encode())

    def site(self, name: str, split: Split = "train", io: IO = "mmap") -> Site:
        """Return the rows of a site in a split.

        Raises NotFoundError if a store lacks the site, IncompatibleError if it is another site in one of them.
        """
        specs = [store.site(name).spec for store in self.stores]
        for store, spec in zip(self.stores, specs, strict=True):
            if _identity(spec) != _identity(specs[0]):
                first = f"{_identity(specs[0])} in {self.stores[0].name}"
                raise IncompatibleError(f"Site {name!r} is {first}, {_identity(spec)} in {store.name}.")
        return Site(self, specs[0], split, io)

    def files(self, site: str, split: Split, io: IO) -> tuple[ShardFile, ...]:
        """Return the files of a site, store by store."""
        return tuple(file for store in self.stores for file in store.files(site, split, io))

    def source_files(self, split: Split, io: IO) -> tuple[tuple[ShardFile, int], ...]:
        """Return the files of the sources, each with the number of tokens in the stores before."""
        return tuple(
            (file, int(first))
            for store, first in zip(self.stores, self._first_tokens, strict=False)
            for file, _ in store.source_files(split, io)
        )

    def moments(self, site: str, split: Split) -> Moments:
        """Return the moments of a site's rows in all stores."""
        return Moments.merged([store.moments(site, split) for store in self.stores], self.site(site).d_in)

    def sources(self, contexts: Ints, positions: Ints) -> Ints:
        """Return the source of each token; contexts are numbered through the stores."""
        found = np.empty_like(contexts)
        firsts = np.cumsum([0, *(store.plan.contexts.contexts for store in self.stores)])
        for number, mine in self._shares(contexts, firsts):
            own = self.stores[number].sources(contexts[mine] - firsts[number], positions[mine])
            found[mine] = own + self._first_tokens[number]
        return found

    def row_numbers(self, sources: Ints, split: Split) -> Ints:
        """Return the row number of each source. Raises NotFoundError for a token that is not a row."""
        found = np.empty_like(sources)
        rows = [sum(file.rows for file, _ in store.source_files(split, "mmap")) for store in self.stores]
        firsts = np.cumsum([0, *rows])
        for number, mine in self._shares(sources, self._first_tokens):
            own = self.stores[number].row_numbers(sources[mine] - self._first_tokens[number], split)
            found[mine] = own + firsts[number]
        return found

    def tokens_around(self, sources: ArrayLike, before: int = 8, after: int = 8) -> NDArray[np.int32]:
        """Return the tokens around each source, (n, before + 1 + after), -1 outside its context."""
        asked = np.atleast_1d(np.asarray(sources, np.int64))
        found = np.empty((len(asked), before + 1 + after), np.int32)
        for number, mine in self._shares(asked, self._first_tokens):
            found[mine] = self.stores[number].tokens_around(asked[mine] - self._first_tokens[number], before, after)
        return found

    def tokens(self) -> NDArray[np.int32]:
        """Return the tokens of all contexts, (contexts, context_size), store by store.

        Raises IncompatibleError if the context sizes differ.
        """
        for other in self.stores[1:]:
            _require_equal(self.stores[0], other, "context_size", lambda s: s.plan.context_size)
        return np.concatenate([store.tokens() for store in self.stores])

    def split(self) -> NDArray[np.uint8]:
        """Return the split of each context, (contexts,): 0 train, 1 held out."""
        return np.concatenate([store.split() for store in self.stores])

    def main_documents(self, contexts: Ints) -> Ints:
        """Return for each of these contexts, (n,), a number of the document that most of its tokens are of.

        Stores of one text, such as a text and its continuation, share its documents.
        """
        firsts = np.cumsum([0, *(store.plan.contexts.contexts for store in self.stores)])
        texts = [_text(store.plan.dataset) for store in self.stores]
        keys = np.empty((len(contexts), 2), np.int64)
        for number, mine in self._shares(contexts, firsts):
            keys[mine, 0] = texts.index(texts[number])
            keys[mine, 1] = self.stores[number].main_documents(contexts[mine] - firsts[number])
        return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)

    @cached_property
    def _first_tokens(self) -> Ints:
        """The flat index of each store's first token, (stores + 1,)."""
        return np.cumsum([0, *(s.plan.contexts.contexts * s.plan.context_size for s in self.stores)])

    def _shares(self, values: Ints, firsts: Ints) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """Yield (index of a store, mask of the values in it); firsts: the first value of each store.

        Values beyond the last store go to the last one, which refuses them.
        """
        owner = np.clip(np.searchsorted(firsts, values, side="right") - 1, 0, len(self.stores) - 1)
        for number in np.unique(owner).tolist():
            yield number, owner == number


def _require_equal(first: Store, other: Store, what: str, of: Callable[[Store], Any]) -> None:
    if of(first) != of(other):
        raise IncompatibleError(
            f"{first.name} and {other.name} cannot be read together: the {what} is {of(first)} and {of(other)}."
        )


def _text(source: DatasetSource) -> tuple[str | None, ...]:
    """Return what identifies a text, whichever of its documents were taken and in which order."""
    return source.id, source.revision, source.split, source.text_field, source.sha256


def _identity(spec: SiteSpec) -> tuple[str, str, int]:
    return spec.module, spec.hook, spec.d_in
