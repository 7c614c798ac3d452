"""The codec `zstd`, in frames of a known size: the size that a frame declares is checked before it is decompressed.

So a forged frame cannot make the reader allocate memory, and a frame with too few bytes is an error.
"""

from typing import Any

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from gsae.errors import CorruptError

from .row_codec import RowCodec, scatter_raw

MAGIC = b"\x28\xb5\x2f\xfd"
HEADER_BYTES = 14  # longest part of a frame header up to the end of the content size (RFC 8878, 3.1.1.1)
SINGLE_SEGMENT = 0x20


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
    head = frame[: HEADER_BYTES + len(MAGIC)].tobytes()
    if len(head) <= len(MAGIC) or not head.startswith(MAGIC):
        return None
    descriptor = head[len(MAGIC)]
    single = bool(descriptor & SINGLE_SEGMENT)
    width = (int(single), 2, 4, 8)[descriptor >> 6]
    first = len(MAGIC) + 1 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    field = head[first : first + width]
    if not width or len(field) < width:
        return None
    return int.from_bytes(field, "little") + (256 if width == 2 else 0)


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
