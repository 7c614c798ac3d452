"""Tokens, their splits and their documents: what the rows of a store come from.

Written first, by a step that needs no language model, in standard codecs; the plan names their sums, so a harvest
that goes on reads them back instead of tokenising again.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError
from gsae.store.codec.chunks import NUMPY_DTYPES, ArraySpec, raw_sha256
from gsae.store.format.arrays import context_arrays
from gsae.store.format.plan import ContextsSpec
from gsae.store.places.shard import Shard

from .window_writer import write_shard

OpenShard = Callable[[ArraySpec, int], Shard]
DOCUMENTS = ("documents/start", "documents/id", "documents/split")


class Rows(Protocol):
    """An array, or what gives its rows like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array's."""

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """Return some rows."""


def write_contexts(root: Path, values: Mapping[str, Rows], ended_early: bool) -> ContextsSpec:
    """Write the five arrays and return what the plan says of them; one file of one of them is in memory at a time.

    contexts/tokens: int32 (contexts, context_size) in source order. contexts/split: uint8 (contexts,), 0 train and 1
    held out. documents/start: int64 (documents,) the flat index of each document's first token, ascending;
    documents/id its number in the source; documents/split as for contexts.
    """
    contexts, context_size = values["contexts/tokens"].shape
    (documents,) = values["documents/start"].shape
    sums = {"contexts/tokens": hashlib.sha256(), "contexts/split": hashlib.sha256()}
    sums |= dict.fromkeys(DOCUMENTS, hashlib.sha256())  # one sum over the three, end to end
    for spec in context_arrays(contexts, context_size, documents):
        for shard in range(spec.shards):
            first = shard * spec.shard_rows
            part = values[spec.path][first : first + spec.rows_of_shard(shard)]
            part = np.ascontiguousarray(part, NUMPY_DTYPES[spec.dtype])
            sums[spec.path].update(part.data)
            write_shard(root, spec, shard, part)
    return ContextsSpec(
        contexts=contexts,
        context_size=context_size,
        documents=documents,
        ended_early=ended_early,
        tokens_sha256=sums["contexts/tokens"].hexdigest(),
        split_sha256=sums["contexts/split"].hexdigest(),
        documents_sha256=sums[DOCUMENTS[0]].hexdigest(),
    )


def context_parts(
    root: Path,
    contexts: ContextsSpec,
    path: str,
    open_shard: OpenShard | None = None,
) -> Iterator[NDArray[Any]]:
    """Yield one of the five arrays file by file; raises as `Shard` does.

    open_shard: opens a file that is not simply under `root`, or that must have a certain size.
    """
    specs = context_arrays(contexts.contexts, contexts.context_size, contexts.documents)
    spec = next(s for s in specs if s.path == path)
    for shard in range(spec.shards):
        with open_shard(spec, shard) if open_shard else Shard(root, spec, shard, io="pread") as file:
            yield file.read().view(NUMPY_DTYPES[spec.dtype]).reshape(-1, *spec.shape[1:])


def read_context_array(
    root: Path, contexts: ContextsSpec, path: str, open_shard: OpenShard | None = None
) -> NDArray[Any]:
    """Read one of the five arrays whole; see `context_parts`."""
    return np.concatenate(list(context_parts(root, contexts, path, open_shard=open_shard)))


def check_contexts(root: Path, contexts: ContextsSpec) -> list[str]:
    """Compare the arrays with the plan's sums; return the faults, one line each."""

    def sum_of(*paths: str) -> str:
        return raw_sha256(part for path in paths for part in context_parts(root, contexts, path))

    return sum_faults(str(root), contexts, sum_of("contexts/tokens"), sum_of("contexts/split"), sum_of(*DOCUMENTS))


def sum_faults(where: str, contexts: ContextsSpec, tokens: str, splits: str, documents: str) -> list[str]:
    """Return a line for each of these sha256 that is not the plan's."""
    due = {
        "tokens": (tokens, contexts.tokens_sha256),
        "splits": (splits, contexts.split_sha256),
        "documents": (documents, contexts.documents_sha256),
    }
    return [f"The {what} of {where} are not those of its plan." for what, (is_, was) in due.items() if is_ != was]


def read_contexts(root: Path, contexts: ContextsSpec) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Read tokens (contexts, context_size) and splits (contexts,); raises CorruptError when they were changed."""
    if faults := check_contexts(root, contexts):
        raise CorruptError(faults[0])
    return (
        read_context_array(root, contexts, "contexts/tokens"),
        read_context_array(root, contexts, "contexts/split"),
    )
