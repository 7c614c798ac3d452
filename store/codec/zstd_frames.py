"""zstd frames that must hold exactly so many bytes: what a frame declares is compared before it is decompressed.

Nothing is allocated on a frame's word, and a frame that holds less than is due cannot leave stale bytes behind it.
"""

from typing import Any

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from gsae.errors import CorruptError

MAGIC = b"\x28\xb5\x2f\xfd"
HEADER_BYTES = 14  # longest part of a frame header up to the end of the content size (RFC 8878, 3.1.1.1)
SINGLE_SEGMENT = 0x20


def compress(data: Any, level: int) -> bytes:
    """Return `data` (a contiguous buffer) as one frame that declares its size."""
    return bytes(zstd.compress(data, level))


def decompress_into(frame: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Fill `out` (contiguous) from one frame; raises CorruptError unless the frame declares and holds that much."""
    declared = content_size(frame)
    if declared != out.size:
        said = "does not say how much it holds" if declared is None else f"says it holds {declared} bytes"
        raise CorruptError(f"a zstd frame {said}; {out.size} bytes are due.")
    try:
        zstd.decompress(frame, out)
    except (RuntimeError, ValueError) as error:
        raise CorruptError(f"a zstd frame does not decompress to {out.size} bytes: {error}.") from None


def content_size(frame: NDArray[np.uint8]) -> int | None:
    """Return the bytes that a frame declares to hold; None when it declares nothing or is no zstd frame."""
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
