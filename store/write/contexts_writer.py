"""Tokens, their splits and their documents are written first, by a step that needs no language model.

They are in standard codecs. The plan names their sha256, so that a harvest that resumes reads them back instead of
tokenising again.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gsae.store.codec.chunks import NUMPY_DTYPES
from gsae.store.format.arrays import DOCUMENTS, context_arrays
from gsae.store.format.plan import ContextsSpec

from .window_writer import write_shard


class Sliceable(Protocol):
    """An array, or an object with a shape that returns parts like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array's."""

    def __getitem__(self, part: slice, /) -> NDArray[Any]:
        """Return some of the first axis."""


def write_contexts(root: Path, values: Mapping[str, Sliceable], ended_early: bool) -> ContextsSpec:
    """Write the five arrays and return what the plan holds of them. One file of one array is in memory at a time.

    contexts/tokens: int32 (contexts, context_size) in source order. contexts/split: uint8 (contexts,), 0 train and 1
    held out. documents/start: int64 (documents,) the flat index of each document's first token, ascending;
    documents/id: its number in the source; documents/split: as for contexts. ended_early: the text ended before it
    gave the requested rows. Raises SpaceError.
    """
    contexts, context_size = values["contexts/tokens"].shape
    (documents,) = values["documents/start"].shape
    sums = {"contexts/tokens": hashlib.sha256(), "contexts/split": hashlib.sha256()}
    sums |= dict.fromkeys(DOCUMENTS, hashlib.sha256())  # one sum over the three arrays end to end
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
