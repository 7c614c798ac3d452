"""Tokens, their splits and their documents: read back file by file, and compared with the sha256 that the plan names.

An array is at least one file; `context_parts` holds one file in memory, the other functions a whole array.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError
from gsae.store.codec.chunks import NUMPY_DTYPES, ArraySpec, raw_sha256
from gsae.store.format.arrays import DOCUMENTS, context_arrays
from gsae.store.format.plan import ContextsSpec
from gsae.store.places.shard import ShardReader, open_shard

OpenShard = Callable[[ArraySpec, int], ShardReader]


def context_parts(contexts: ContextsSpec, path: str, opener: OpenShard) -> Iterator[NDArray[Any]]:
    """Yield one of the five arrays file by file; opener: opens a file of an array. Raises as `ShardReader`."""
    specs = context_arrays(contexts.contexts, contexts.context_size, contexts.documents)
    spec = next(s for s in specs if s.path == path)
    for shard in range(spec.shards):
        with opener(spec, shard) as file:
            yield file.read().view(NUMPY_DTYPES[spec.dtype]).reshape(-1, *spec.shape[1:])


def read_context_array(contexts: ContextsSpec, path: str, opener: OpenShard) -> NDArray[Any]:
    """Read one of the five arrays whole; see `context_parts`."""
    return np.concatenate(list(context_parts(contexts, path, opener)))


def read_contexts(root: Path, contexts: ContextsSpec) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Read tokens (contexts, context_size) and splits (contexts,) from the folder `root`.

    Raises CorruptError if they, or the documents, are not those of the plan; NotFoundError if a file is missing.
    """
    opener = partial(open_shard, root)

    def sha256_of(*paths: str) -> str:
        return raw_sha256(part for path in paths for part in context_parts(contexts, path, opener))

    faults = sum_faults(
        str(root), contexts, sha256_of("contexts/tokens"), sha256_of("contexts/split"), sha256_of(*DOCUMENTS)
    )
    if faults:
        raise CorruptError(faults[0])
    return (
        read_context_array(contexts, "contexts/tokens", opener),
        read_context_array(contexts, "contexts/split", opener),
    )


def sum_faults(where: str, contexts: ContextsSpec, tokens: str, splits: str, documents: str) -> list[str]:
    """Return a line for each of these sha256 that differs from the plan's."""
    pairs = {
        "tokens": (tokens, contexts.tokens_sha256),
        "splits": (splits, contexts.split_sha256),
        "documents": (documents, contexts.documents_sha256),
    }
    return [f"The {what} of {where} are not those of its plan." for what, (is_, was) in pairs.items() if is_ != was]
