"""The codec `none`: rows as they are, for readers of any kind and for disks that are faster than decoding."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .row_codec import RowCodec, scatter_raw


def _decode_into(body: memoryview, out: NDArray[Any], places: NDArray[np.int64]) -> None:
    scatter_raw(np.frombuffer(body, np.uint8), out, places)


UNCOMPRESSED = RowCodec(
    name="none",
    levels=None,
    dtypes=None,
    typical_ratio=lambda level: 1.0,
    zarr=lambda as_bytes, level: [as_bytes],
    encode=lambda rows, level: np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data,
    decode_into=_decode_into,
)
