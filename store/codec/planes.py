"""The codec `gsae.planes` for bfloat16 rows: lossless, about 0.67 of raw, decoded at several GB/s a core.

The sign and mantissa of a bfloat16 activation are noise; its exponent lies within a few steps of its channel's median.
So sign and mantissa are stored unchanged (one byte a value), and exponents become nibbles above a base for each
channel, packed so that unpacking is plain vector code. Exponents outside that range go to an exception list. Level 1
runs zstd over 256 KiB blocks of nibbles, which acts as a Huffman coder on pairs (0.67 of raw); level 0 does not (0.75
of raw, at the speed of memory). A chunk contains its bases, so it can be read alone.

A chunk, little-endian:

    magic "GSP1", u8 form (0 nibbles, 1 bytes), u8 packing (0 none, 1 zstd), u16 0,
    u32 rows, u32 channels, u32 block_rows, u32 exceptions
    u8  base[channels]                 exponent of nibble 0
    u32 packed_size[blocks]            bytes of each packed block
    u32 exception_start[blocks + 1]    first exception of each block
    u32 position[exceptions]           row * channels + channel, ascending
    u8  exponent[exceptions]
    packed blocks                      block_rows rows each: nibbles (form 0) or exponents (form 1)
    u8  low[rows, channels]            sign << 7 | mantissa

Form 1 is for chunks in which so many exponents would be exceptions that it is smaller.
"""

import itertools
import struct
from typing import Any

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray_like
from numpy.typing import NDArray

from gsae.errors import CorruptError

from . import planes_kernels as kernels
from . import zstd_frames as frames
from .planes_bases import fitted_bases
from .planes_kernels import I64, U8, U16, U32
from .row_codec import RowCodec

HEADER = struct.Struct("<4sBBHIIII")
MAGIC = b"GSP1"
NIBBLES, BYTES = 0, 1
NONE, ZSTD = 0, 1
BLOCK_BYTES = 256 << 10

# An exception takes five bytes. Form 1 is larger than form 0 by 0.25 of raw without zstd, and by about 0.02 with it.
MAX_EXCEPTION_SHARE = {NONE: 0.1, ZSTD: 0.015}


def encode(x: U16, level: int) -> bytes:
    """Encode as `encode_buffer` does, to bytes; Python's lock is held while they are copied."""
    return encode_buffer(x, level).tobytes()


def encode_buffer(x: U16, level: int) -> memoryview:
    """Encode bfloat16 bit patterns x (rows, channels). level: 0 keeps the nibbles as they are, 1 and more run zstd."""
    rows, channels = x.shape
    if rows * channels >= 2**32:
        raise ValueError(
            f"a chunk of {rows} x {channels} values is too large for gsae.planes, which takes fewer than 2^32"
        )
    low = np.empty((rows, channels), np.uint8)
    nibbles = np.empty((rows, (channels + 1) // 2), np.uint8)
    base = fitted_bases(x)
    limit = int(rows * channels * MAX_EXCEPTION_SHARE[ZSTD if level else NONE]) + 1
    at, exponents = np.empty(limit, np.uint32), np.empty(limit, np.uint8)
    n = kernels.pack(x, base, low, nibbles, at, exponents)
    if n >= 0:
        return _assemble(NIBBLES, level, low, nibbles, base, at[:n], exponents[:n])
    every = np.empty((rows, channels), np.uint8)
    kernels.split_bytes(x, low, every)
    return _assemble(BYTES, level, low, every, np.zeros(channels, np.uint8), at[:0], exponents[:0])


def _assemble(form: int, level: int, low: U8, packed: U8, base: U8, at: U32, values: U8) -> memoryview:
    rows, channels = low.shape
    # With zstd, a block fits the second-level cache; without it, one block is enough.
    block_rows = max(BLOCK_BYTES // max(packed.shape[1], 1) if level else rows, 1)
    blocks: list[Any] = [packed[i : i + block_rows] for i in range(0, rows, block_rows)]
    if level:
        blocks = [frames.compress(block, level) for block in blocks]
    sizes = np.array([memoryview(b).nbytes for b in blocks], "<u4")
    ends = np.minimum(np.arange(len(blocks) + 1) * block_rows, rows) * channels
    starts = np.searchsorted(at, ends).astype("<u4")
    header = HEADER.pack(MAGIC, form, ZSTD if level else NONE, 0, rows, channels, block_rows, len(at))
    parts: list[Any] = [header, base, sizes, starts, at.astype("<u4", copy=False), values, *blocks, low]
    # numpy copies without Python's lock. b"".join holds it for milliseconds, because parts are arrays.
    return np.concatenate([np.frombuffer(part, np.uint8) for part in parts]).data


def decode_into(data: Any, out: U16, places: I64) -> None:
    """Decode a chunk from a buffer, which is not copied, into rows places (rows,) of out (any, channels).

    Raises CorruptError if the chunk is damaged or does not have len(places) rows of out's width, ValueError if a place
    is not in `out` or `out` is not C-contiguous. Memory is one block, also for a forged chunk.
    """
    if not out.flags.c_contiguous or (len(places) and (places.min() < 0 or places.max() >= len(out))):
        raise ValueError(f"places must lie in an array of shape {out.shape}, which must be C-contiguous; got {places}")
    buffer = np.frombuffer(data, np.uint8)
    buffer.flags.writeable = False
    chunk = _Chunk(buffer, rows=len(places), channels=out.shape[1])
    scratch = np.empty((min(chunk.block_rows, chunk.rows) if chunk.packing else 0, chunk.width), np.uint8)
    for i in range(chunk.blocks):
        first = i * chunk.block_rows
        part = slice(first, first + chunk.block_rows)
        low, to = chunk.low[part], places[part]
        packed = chunk.packed(i, len(low), scratch)
        if chunk.form == BYTES:
            kernels.join_bytes(low, packed, out, to)
            continue
        at, exponents = chunk.exceptions(i)
        if kernels.unpack(low, packed, chunk.base, at, exponents, first, out, to) < len(at):
            raise CorruptError(f"an exception of block {i} of a planes chunk lies outside it or out of order.")


class _Chunk:
    """The parts of an encoded chunk as read-only views; every size is checked against the size of the buffer."""

    def __init__(self, buffer: U8, rows: int, channels: int) -> None:
        if len(buffer) < HEADER.size:
            raise CorruptError(f"a planes chunk needs a header of {HEADER.size} bytes; this one has {len(buffer)}.")
        magic, form, packing, zero, *sizes = HEADER.unpack(buffer[: HEADER.size].tobytes())
        self.rows, self.channels, self.block_rows, exceptions = sizes
        if magic != MAGIC or form not in (NIBBLES, BYTES) or packing not in (NONE, ZSTD) or zero:
            raise CorruptError("the header of a planes chunk is damaged.")
        if (self.rows, self.channels) != (rows, channels):
            raise CorruptError(
                f"a planes chunk declares {self.rows} x {self.channels} values; {rows} x {channels} are needed."
            )
        if self.block_rows < 1:
            raise CorruptError("a planes chunk declares blocks without rows.")
        self.form, self.packing = form, packing
        self.blocks = -(-rows // self.block_rows)
        self.width = (channels + 1) // 2 if form == NIBBLES else channels
        counts = [channels, 4 * self.blocks, 4 * (self.blocks + 1), 4 * exceptions, exceptions]
        ends = list(itertools.accumulate([HEADER.size, *counts]))
        if ends[-1] + rows * channels > len(buffer):
            raise CorruptError(f"a planes chunk of {len(buffer)} bytes is truncated.")
        self.base, packed, starts, at, self.values = (buffer[a:b] for a, b in itertools.pairwise(ends))
        self.starts = starts.view("<u4").tolist()
        self.at = at.copy().view("<u4")  # it may be unaligned in the chunk
        self.offsets = list(itertools.accumulate(packed.view("<u4").tolist(), initial=ends[-1]))
        self.low = buffer[len(buffer) - rows * channels :].reshape(rows, channels)
        self.buffer = buffer
        self._check(exceptions)

    def _check(self, exceptions: int) -> None:
        if self.offsets[-1] + self.rows * self.channels != len(self.buffer):
            raise CorruptError(f"the blocks of a planes chunk of {len(self.buffer)} bytes do not add up to its size.")
        ascending = all(a <= b for a, b in itertools.pairwise(self.starts))
        if self.starts[0] != 0 or self.starts[-1] != exceptions or not ascending:
            raise CorruptError("the exception table of a planes chunk is damaged.")

    def packed(self, block: int, rows: int, scratch: U8) -> U8:
        """Return block `block`, of `rows` rows, unpacked (rows, width): a view, or decompressed into `scratch`."""
        raw = self.buffer[self.offsets[block] : self.offsets[block + 1]]
        if self.packing == NONE:
            if len(raw) != rows * self.width:
                raise CorruptError(
                    f"block {block} of a planes chunk has {len(raw)} bytes; {rows * self.width} are needed."
                )
            return raw.reshape(rows, self.width)
        unpacked = scratch[:rows]
        frames.decompress_into(raw, unpacked)
        unpacked.flags.writeable = False  # so that the kernels are compiled for one type only
        return unpacked

    def exceptions(self, block: int) -> tuple[U32, U8]:
        """Return the positions and exponents of the exceptions of a block."""
        part = slice(self.starts[block], self.starts[block + 1])
        return self.at[part], self.values[part]


class Planes(Codec):  # type: ignore[misc]
    """`gsae.planes` as a numcodecs codec.

    Parameters
    ----------
    channels : int
        Width of a row; the number of values must be a multiple of it.
    level : int
        0 keeps the nibbles as they are (0.75 of raw, at the speed of memory); 1 and more run zstd over them (0.67).

    Notes
    -----
    For items of 16 bits. Every bit pattern is restored exactly, NaN payloads included, but only bfloat16 activations
    become smaller.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.arange(8, dtype=np.uint16).reshape(2, 4)
    >>> codec = Planes(channels=4)
    >>> codec.decode(codec.encode(rows)).view(np.uint16).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    codec_id = "gsae.planes"

    def __init__(self, channels: int, level: int = 1) -> None:
        self.channels = channels
        self.level = level

    def encode(self, buf: Any) -> bytes:
        """Encode a buffer of 16-bit items, row after row."""
        flat = ensure_contiguous_ndarray_like(buf).view(np.uint16)
        if flat.size % self.channels:
            raise ValueError(f"{flat.size} values are not a multiple of {self.channels} channels")
        return encode(np.asarray(flat).reshape(-1, self.channels), self.level)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Decode into `out`, or into a new array of bytes."""
        data = ensure_contiguous_ndarray_like(buf).view(np.uint8)
        if out is None:
            if len(data) < HEADER.size:
                raise CorruptError(f"a planes chunk needs a header of {HEADER.size} bytes; this has {len(data)}.")
            rows = HEADER.unpack(data[: HEADER.size].tobytes())[4]
            # A value takes at least one byte, so a forged number of rows allocates at most twice the size of the chunk.
            if rows * self.channels > len(data):
                raise CorruptError(f"a planes chunk of {len(data)} bytes cannot hold {rows} rows.")
            out = np.empty(rows * self.channels * 2, np.uint8)
        target = ensure_contiguous_ndarray_like(out).view(np.uint16)
        if target.size % self.channels:
            raise ValueError(f"out has {target.size} values, which is not a multiple of {self.channels} channels")
        rows_out: NDArray[np.uint16] = np.asarray(target).reshape(-1, self.channels)
        decode_into(data, rows_out, np.arange(len(rows_out)))
        return out

    def get_config(self) -> dict[str, Any]:
        """Return the codec's id and parameters."""
        return {"id": self.codec_id, "channels": self.channels, "level": self.level}


PLANES = RowCodec(
    name="planes",
    levels=(0, 1),
    dtypes=("bfloat16", "float16"),
    typical_ratio=lambda level: 0.68 if level else 0.755,
    zarr=lambda as_bytes, level: [{"name": "gsae.planes", "configuration": {"level": level}}],
    encode=lambda rows, level: encode_buffer(rows.view(np.uint16), level),
    decode_into=decode_into,
)
