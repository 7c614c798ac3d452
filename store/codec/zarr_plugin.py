"""What zarr-python needs to read the arrays of a store: the data type `bfloat16` and the codec `gsae.planes`.

zarr-python finds codecs by entry points, but data types must be registered, so importing `gsae.store` calls `register`.
The reader of gsae does not use this module; it is for other programs, and for independent tests of the reader.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.npy.float import BaseFloat
from zarr.registry import register_codec

from . import planes


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """The Zarr v3 data type `bfloat16`, as tensorstore names it, over ml_dtypes."""

    dtype_cls = type(np.dtype(ml_dtypes.bfloat16))
    _zarr_v3_name = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @property
    def item_size(self) -> int:
        """Bytes of a value."""
        return 2


@dataclass(frozen=True)
class PlanesCodec(ArrayBytesCodec):
    """`gsae.planes` as a Zarr v3 array-to-bytes codec; the last dimension of a chunk is its channels."""

    is_fixed_size = False
    level: int = 1

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read the codec's metadata."""
        return cls(**data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        """Return the codec's metadata."""
        return {"name": "gsae.planes", "configuration": {"level": self.level}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Raise NotImplementedError: the size depends on the values."""
        raise NotImplementedError

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        rows = np.empty((int(np.prod(chunk_spec.shape[:-1])), chunk_spec.shape[-1]), np.uint16)
        planes.decode_into(chunk_bytes.as_numpy_array(), rows, np.arange(len(rows)))
        native = chunk_spec.dtype.to_native_dtype()
        values: Any = rows.view(native).reshape(chunk_spec.shape)
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(values)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        rows = np.ascontiguousarray(chunk_array.as_numpy_array()).view(np.uint16)
        encoded = planes.encode(rows.reshape(-1, chunk_spec.shape[-1]), self.level)
        return chunk_spec.prototype.buffer.from_bytes(encoded)


def register() -> None:
    """Register both with zarr-python; a second call changes nothing."""
    register_codec("gsae.planes", PlanesCodec)
    if data_type_registry.contents.get("bfloat16") is not BFloat16:
        data_type_registry.register("bfloat16", BFloat16)
