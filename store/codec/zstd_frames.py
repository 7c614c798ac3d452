"""The codec `zstd`, in frames of a known size: the size that a frame declares is checked before it is decompressed.

So a forged frame cannot make the reader allocate memory, and a frame with too few bytes is an error.
"""

from typing import Any

import numpy as np
import zstandard
from numcodecs import zstd
from numpy.typing import NDArray

from gsae.errors import CorruptError

from .row_codec import RowCodec, scatter_raw


def compress(data: Any, level: int) -> bytes:
    """Return `data` (a contiguous buffer) as one frame that declares its size."""
    return bytes(zstd.compress(data, level))


def decompress_into(frame: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Fill `out` (contiguous) from one frame. Raises CorruptError unless the frame declares and holds that size."""
    declared = content_size(frame)
    if declared != out.size:
        found = "does not declare its size" if declared is None else f"declares {declared} bytes"
        raise CorruptError(f"a zstd frame {found}; {out.size} bytes are needed.")
    try:
        zstd.decompress(frame, out)
    except (RuntimeError, ValueError) as error:
        raise CorruptError(f"a zstd frame does not decompress to {out.size} bytes: {error}.") from None


def content_size(frame: NDArray[np.uint8]) -> int | None:
    """Return the number of bytes that a frame declares; None if it declares none, or is not a zstd frame."""
    try:
        declared = int(zstandard.frame_content_size(frame.data))
    except zstandard.ZstdError:
        return None
    return None if declared < 0 else declared


def _encode(rows: NDArray[Any], level: int) -> bytes:
    return compress(np.ascontiguousarray(rows).view(np.uint8), level)


def _decode_into(body: memoryview, out: NDArray[Any], places: NDArray[np.int64]) -> None:
    raw = np.empty(len(places) * out.shape[1] * out.itemsize, np.uint8)
    decompress_into(np.frombuffer(body, np.uint8), raw)
    scatter_raw(raw, out, places)


ZSTD = RowCodec(
    name="zstd",
    levels=(1, 22),
    dtypes=None,
    typical_ratio=lambda level: 0.79,
    zarr=lambda as_bytes, level: [
        as_bytes,
        {"name": "zstd", "configuration": {"level": level, "checksum": False}},
    ],
    encode=_encode,
    decode_into=_decode_into,
)
