"""One shard file of an array, open for reading: mapped, or read with pread; chunks are decoded from where they lie.

The index is checked once, when the file is opened. The size is checked by fstat before the file is mapped, because a
file that is shorter than its map kills the process (SIGBUS). pread gives the same bytes without a map, for NFS and
FUSE; it costs one copy of each encoded chunk.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError, NotFoundError
from gsae.store.codec.chunks import ArraySpec, decode_index, unsigned

IO = Literal["mmap", "pread"]
Ints = NDArray[np.int64]


class OpenFile(NamedTuple):
    """An open file: its path, for messages, and its descriptor. Whoever receives it closes it."""

    path: Path
    descriptor: int


class ShardReader:
    """An open shard file: `rows` rows in `chunks` chunks. Close it, or use it in a `with`."""

    def __init__(
        self, file: OpenFile, spec: ArraySpec, number: int, *, size: int | None = None, io: IO = "mmap"
    ) -> None:
        """Read shard `number` of the array `spec` from `file`, which is closed with the reader, or on an error.

        size: the bytes that the file must have; None for any. Raises CorruptError for another size or a damaged index.
        """
        self.path, self._descriptor = file
        self.spec = spec
        self.closed = False
        self.rows = spec.rows_of_shard(number)
        self.chunks = -(-self.rows // spec.chunk_rows)
        self._map: mmap.mmap | None = None
        with self._named(), _closed_on_error(self._descriptor):
            self.size = os.fstat(self._descriptor).st_size
            if size is not None and self.size != size:
                raise CorruptError(f"the file has {self.size} bytes; {size} were written.")
            tail = 16 * spec.chunks_of_shard + 4
            if self.size < tail:
                raise CorruptError(f"the file has {self.size} bytes, too few for its index of {tail}.")
            if io == "mmap":
                self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
            data = self._read(self.size - tail, tail)
            self.index = decode_index(data, self.size, self.chunks, spec.chunks_of_shard)

    def rows_of_chunk(self, chunk: int) -> int:
        """Rows of chunk `chunk`; the last one may have fewer."""
        return min(self.spec.chunk_rows, self.rows - chunk * self.spec.chunk_rows)

    def will_need(self, chunk: int) -> None:
        """Have the kernel fetch a chunk that is read soon; unlike MADV_WILLNEED this lets other threads run."""
        offset, size = map(int, self.index[chunk])
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def decode_into(self, chunk: int, out: NDArray[Any], places: Ints) -> None:
        """Decode chunk `chunk` into rows places (rows of the chunk,) of out (any, width), unsigned bit patterns.

        Raises CorruptError naming the file and chunk.
        """
        offset, size = map(int, self.index[chunk])
        with self._named(f"chunk {chunk}: "):
            data = self._read(offset, size)
            if len(places) == self.spec.chunk_rows:
                self.spec.decode_into(data, out, places)
                return
            whole = np.empty((self.spec.chunk_rows, self.spec.width), out.dtype)
            self.spec.decode_into(data, whole, np.arange(len(whole)))
            out[places] = whole[: len(places)]

    def read(self) -> NDArray[Any]:
        """Return all rows, (rows, width), as unsigned bit patterns. Raises CorruptError."""
        out = np.empty((self.rows, self.spec.width), unsigned(self.spec.dtype))
        for chunk in range(self.chunks):
            first = chunk * self.spec.chunk_rows
            self.decode_into(chunk, out, np.arange(first, first + self.rows_of_chunk(chunk)))
        return out

    def close(self) -> None:
        """Unmap and close the file; a second call changes nothing."""
        if self.closed:
            return
        self.closed = True
        if self._map is not None:
            with suppress(BufferError):  # the traceback of an error still holds a part of the map; it is freed with it
                self._map.close()
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, offset: int, size: int) -> memoryview:
        if self._map is not None:
            return memoryview(self._map)[offset : offset + size]
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise CorruptError(f"{len(data)} bytes could be read at {offset}; {size} are needed.")
        return memoryview(data)

    @contextmanager
    def _named(self, chunk: str = "") -> Iterator[None]:
        """Put the file and chunk in front of the message of an error."""
        try:
            yield
        except CorruptError as error:
            raise CorruptError(f"{self.path}: {chunk}{error}") from None


def open_shard(root: Path, spec: ArraySpec, number: int) -> ShardReader:
    """Open shard `number` of an array in the local folder `root`, without a map. Raises NotFoundError, CorruptError."""
    return ShardReader(open_file(root / spec.file(number)), spec, number, io="pread")


def open_file(path: Path) -> OpenFile:
    """Open a file for reading, without waiting if it is a pipe. Raises NotFoundError."""
    try:
        return OpenFile(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing.") from None
    except OSError as error:
        raise NotFoundError(f"{path} cannot be opened: {error.strerror}.") from None


@contextmanager
def _closed_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise
