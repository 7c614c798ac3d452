"""What a codec of rows is: how a chunk of rows is compressed, restored, and named in Zarr's metadata.

A checksum follows every codec (`chunks.py`), so that a codec only sees bytes that were written. It must still check
sizes: they may come from a forged chunk with a right checksum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError

from .scatter import scatter

Encoded = bytes | memoryview
"""The bytes of an encoded chunk."""


@dataclass(frozen=True)
class RowCodec:
    """A lossless codec of chunks of rows.

    name: in plans and options. levels: lowest and highest; None if it has none. dtypes: of the rows that it takes; None
    for all. typical_ratio: encoded bytes over raw bytes that activations have at a level, for estimates. zarr: the
    entries of the chunk's codecs in zarr.json at a level, given the entry of Zarr's codec `bytes`. encode: the bytes of
    rows (chunk_rows, width), values or bit patterns, at a level; they may share the memory of the rows. decode_into:
    restores a chunk of some rows to rows `places` (chunk_rows,) of `out` (any, width), which holds bit patterns; raises
    CorruptError.
    """

    name: str
    levels: tuple[int, int] | None
    dtypes: tuple[str, ...] | None
    typical_ratio: Callable[[int], float]
    zarr: Callable[[dict[str, Any], int], list[dict[str, Any]]]
    encode: Callable[[NDArray[Any], int], Encoded]
    decode_into: Callable[[memoryview, NDArray[Any], NDArray[np.int64]], None]

    def fault(self, level: int, dtype: str) -> str | None:
        """Return why rows of a dtype cannot be encoded at a level; None if they can."""
        low, high = self.levels or (level, level)
        if not low <= level <= high:
            return f"level: got {level}; codec {self.name} needs {low} to {high}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"codec: {self.name} is for rows of {', '.join(self.dtypes)}; got dtype {dtype}"
        return None


def scatter_raw(raw: NDArray[np.uint8], out: NDArray[Any], places: NDArray[np.int64]) -> None:
    """Put the raw bytes of rows into rows `places` of `out`. Raises CorruptError unless they are so many rows."""
    size = len(places) * out.shape[1] * out.itemsize
    if len(raw) != size:
        raise CorruptError(f"a chunk has {len(raw)} bytes; {size} are needed.")
    scatter(raw.view(out.dtype).reshape(len(places), out.shape[1]), out, places)
