"""Tokens, their splits and their documents: what the rows of a store come from.

Written first, by a step that needs no language model, in standard codecs; the plan names their sums, so a harvest
that goes on reads them back instead of tokenising again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import context_arrays
from .chunks import NUMPY_DTYPES
from .errors import CorruptError
from .mapped import Shard
from .plan import ContextsSpec
from .publish import raw_sha256
from .writer import write_shard

DOCUMENTS = ("documents/start", "documents/id", "documents/split")


def write_contexts(root: Path, values: Mapping[str, NDArray[Any]], ended_early: bool) -> ContextsSpec:
    """Write the five arrays and return what the plan says of them.

    contexts/tokens: int32 (contexts, context_size) in source order. contexts/split: uint8 (contexts,), 0 train and 1
    held out. documents/start: int64 (documents,) the flat index of each document's first token, ascending;
    documents/id its number in the source; documents/split as for contexts.
    """
    contexts, context_size = values["contexts/tokens"].shape
    documents = len(values["documents/start"])
    for spec in context_arrays(contexts, context_size, documents):
        whole = np.ascontiguousarray(values[spec.path], NUMPY_DTYPES[spec.dtype])
        for shard in range(spec.shards):
            first = shard * spec.shard_rows
            write_shard(root, spec, shard, whole[first : first + spec.rows_of_shard(shard)])
    return ContextsSpec(
        contexts=contexts,
        context_size=context_size,
        documents=documents,
        ended_early=ended_early,
        tokens_sha256=raw_sha256([values["contexts/tokens"]]),
        split_sha256=raw_sha256([values["contexts/split"]]),
        documents_sha256=raw_sha256(values[path] for path in DOCUMENTS),
    )


def read_context_array(
    root: Path, contexts: ContextsSpec, path: str, sizes: Mapping[str, int] | None = None
) -> NDArray[Any]:
    """Read one of the five arrays; sizes: the bytes that its files must have. Raises as `Shard` does."""
    specs = context_arrays(contexts.contexts, contexts.context_size, contexts.documents)
    spec = next(s for s in specs if s.path == path)
    parts = []
    for shard in range(spec.shards):
        with Shard(root, spec, shard, sizes[spec.file(shard)] if sizes else None) as file:
            parts.append(file.read())
    return np.concatenate(parts).view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)


def check_contexts(root: Path, contexts: ContextsSpec, sizes: Mapping[str, int] | None = None) -> list[str]:
    """Compare the arrays with the plan's sums; return the faults, one line each."""

    def read(path: str) -> NDArray[Any]:
        return read_context_array(root, contexts, path, sizes)

    found = {
        "tokens": (raw_sha256([read("contexts/tokens")]), contexts.tokens_sha256),
        "splits": (raw_sha256([read("contexts/split")]), contexts.split_sha256),
        "documents": (raw_sha256(map(read, DOCUMENTS)), contexts.documents_sha256),
    }
    return [f"The {what} of {root} are not those of its plan." for what, (is_, due) in found.items() if is_ != due]


def read_contexts(root: Path, contexts: ContextsSpec) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Read tokens (contexts, context_size) and splits (contexts,); raises CorruptError when they were changed."""
    if faults := check_contexts(root, contexts):
        raise CorruptError(faults[0])
    return (
        read_context_array(root, contexts, "contexts/tokens"),
        read_context_array(root, contexts, "contexts/split"),
    )
