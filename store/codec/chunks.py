"""The chunks of an array: element type, codecs, and how one chunk is encoded and decoded.

Every array of a store is described by one `ArraySpec`; the Zarr metadata, the writer and the reader follow from it.
The last codec is always crc32c. It is checked before anything is decoded, so that a changed bit is an error and never
a wrong number. It costs a few per cent of decoding.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import crc32c
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError

from .registry import ROW_CODECS
from .row_codec import Encoded

ZSTD_LEVEL = 1
CRC_BYTES = 4
MISSING = 2**64 - 1

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "uint8": np.dtype("u1"),
}
UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def unsigned(dtype: str) -> type[np.unsignedinteger[Any]]:
    """Return the unsigned integers that hold the bit patterns of a store's dtype."""
    return UNSIGNED[NUMPY_DTYPES[dtype].itemsize]


def raw_sha256(arrays: Iterable[NDArray[Any]]) -> str:
    """Return the sha256 of the bytes of arrays laid end to end."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class ArraySpec:
    """An array of rows: `shape` (rows,) or (rows, width), cut into shard files of `shard_rows` rows.

    path: its folder in the store. chunk_rows divides shard_rows. Every chunk in a file has chunk_rows rows; the last
    one is padded with the fill value.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    chunk_rows: int
    shard_rows: int
    codec: str
    level: int = ZSTD_LEVEL

    @property
    def rows(self) -> int:
        """Rows of the array."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        """Raw bytes of a row."""
        return self.width * NUMPY_DTYPES[self.dtype].itemsize

    @property
    def shards(self) -> int:
        """Number of shard files."""
        return -(-self.rows // self.shard_rows)

    @property
    def chunks_of_shard(self) -> int:
        """Number of entries in the index of a shard."""
        return self.shard_rows // self.chunk_rows

    def rows_of_shard(self, shard: int) -> int:
        """Return the rows of shard `shard`; the last one may have fewer."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    def file(self, shard: int) -> str:
        """Return the path of a shard file in the store, by Zarr's default chunk keys."""
        return f"{self.path}/c/{shard}" + "/0" * (len(self.shape) - 1)

    def metadata(self) -> dict[str, Any]:
        """Return the array's `zarr.json`."""
        endian = {"name": "bytes"} if self.dtype == "uint8" else _little_endian()
        inner = {
            "chunk_shape": [self.chunk_rows, *self.shape[1:]],
            "codecs": [*ROW_CODECS[self.codec].zarr(endian, self.level), {"name": "crc32c"}],
            "index_codecs": [_little_endian(), {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.shard_rows, *self.shape[1:]]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if "float" in self.dtype else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
            "attributes": {},
        }

    def fill(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return `rows`, values or bit patterns, padded to chunk_rows rows with the fill value."""
        if len(rows) == self.chunk_rows:
            return rows
        value = np.full((), np.nan if "float" in self.dtype else 0, NUMPY_DTYPES[self.dtype]).view(rows.dtype)
        full = np.full((self.chunk_rows, *rows.shape[1:]), value)
        full[: len(rows)] = rows
        return full

    def encode(self, rows: NDArray[Any]) -> tuple[Encoded, bytes]:
        """Encode one chunk, (chunk_rows, width) or (chunk_rows,); return its bytes, as `RowCodec`, and their crc32c."""
        encoded = ROW_CODECS[self.codec].encode(rows, self.level)
        return encoded, crc32c.crc32c(encoded).to_bytes(CRC_BYTES, "little")

    def decode_into(self, chunk: memoryview, out: NDArray[Any], places: NDArray[np.int64]) -> None:
        """Check the crc32c of a chunk and decode it into rows places (chunk_rows,) of out (any, width).

        `out` holds bit patterns: unsigned integers of the item size. Raises CorruptError.
        """
        ROW_CODECS[self.codec].decode_into(without_crc(chunk), out, places)


def encoded_bytes(rows: NDArray[Any], dtype: str, codec: str, level: int) -> int:
    """Return the bytes that rows (rows, width), values or bit patterns, take as one chunk."""
    spec = ArraySpec("", dtype, rows.shape, len(rows), len(rows), codec, level)
    return sum(map(len, spec.encode(rows)))


def without_crc(chunk: memoryview) -> memoryview:
    """Return a chunk without its crc32c. Raises CorruptError if the crc32c is wrong."""
    if len(chunk) < CRC_BYTES:
        raise CorruptError(f"a chunk has {len(chunk)} bytes, too few for its crc32c.")
    body, crc = chunk[:-CRC_BYTES], int.from_bytes(chunk[-CRC_BYTES:], "little")
    found = crc32c.crc32c(body)
    if found != crc:
        raise CorruptError(f"the crc32c of a chunk is {found:08x}; {crc:08x} was written.")
    return body


def encode_index(entries: list[tuple[int, int]], count: int) -> bytes:
    """Return the index of a shard: (offset, size) of each of `count` chunks (MISSING if absent), and its crc32c."""
    table = np.full((count, 2), MISSING, "<u8")
    if entries:
        table[: len(entries)] = entries
    body = table.tobytes()
    return body + crc32c.crc32c(body).to_bytes(CRC_BYTES, "little")


def decode_index(tail: memoryview, size: int, present: int, count: int) -> NDArray[np.int64]:
    """Read the index at the end of a shard file of `size` bytes; return offsets and sizes, (present, 2).

    present: the number of chunks that the file has; the other `count - present` must be absent. Raises CorruptError.
    """
    table = np.frombuffer(without_crc(tail), "<u8").reshape(count, 2)
    here, gone = table[:present], table[present:]
    ends = here[:, 0] + here[:, 1]
    if np.any(gone != MISSING) or np.any(ends > size - len(tail)) or np.any(ends < here[:, 0]):
        raise CorruptError("the index points outside the file, or lists chunks that the array does not have.")
    return here.astype(np.int64)


def _little_endian() -> dict[str, Any]:
    return {"name": "bytes", "configuration": {"endian": "little"}}
