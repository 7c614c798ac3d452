"""One shard file, mapped (or read with pread), its index checked once, its chunks decoded where they lie.

Sizes are checked by fstat before mapping: a file truncated under a map kills the process (SIGBUS), so what can be
seen beforehand is an error with a name. pread gives the same bytes without maps, for NFS and FUSE.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError, NotFoundError
from gsae.store.codec.chunks import ArraySpec, decode_index, unsigned

IO = Literal["mmap", "pread"]
Opened = tuple[Path, int]  # a file's path, as messages have it, and its descriptor
Ints = NDArray[np.int64]


class Shard:
    """An open shard file: `rows` rows in chunks of `spec.chunk_rows`. Close it, or use it in a `with`."""

    def __init__(
        self,
        root: Path,
        spec: ArraySpec,
        shard: int,
        size: int | None = None,
        io: IO = "mmap",
        opened: Opened | None = None,
    ) -> None:
        """Open shard `shard` of an array under `root`; size: the bytes it must have.

        opened: the file itself, wherever it is; it is closed with the shard.

        Raises NotFoundError, or CorruptError for a wrong size or a damaged index.
        """
        self.path = opened[0] if opened else root / spec.file(shard)
        self.spec = spec
        self.closed = False
        self.rows = spec.rows_of_shard(shard)
        self.chunks = -(-self.rows // spec.chunk_rows)
        self._fd = opened[1] if opened else open_file(self.path)
        self._map: mmap.mmap | None = None
        with self._named(), _closed_on_error(self._fd):
            self.size = os.fstat(self._fd).st_size
            if size is not None and self.size != size:
                raise CorruptError(f"the file has {self.size} bytes; {size} were written.")
            tail = 16 * spec.chunks_of_shard + 4
            if self.size < tail:
                raise CorruptError(f"the file has {self.size} bytes, too few for its index of {tail}.")
            if io == "mmap":
                self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
            data = self._read(self.size - tail, tail)
            self.index = decode_index(data, self.size, self.chunks, spec.chunks_of_shard)

    def chunk_rows(self, chunk: int) -> int:
        """Rows of chunk `chunk`; the last one may have fewer."""
        return min(self.spec.chunk_rows, self.rows - chunk * self.spec.chunk_rows)

    def will_need(self, chunk: int) -> None:
        """Have the kernel fetch a chunk that comes soon; unlike MADV_WILLNEED this lets other threads run."""
        offset, size = map(int, self.index[chunk])
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_WILLNEED)

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
        """Return all rows, (rows, width), as unsigned bit patterns."""
        out = np.empty((self.rows, self.spec.width), unsigned(self.spec.dtype))
        for chunk in range(self.chunks):
            first = chunk * self.spec.chunk_rows
            self.decode_into(chunk, out, np.arange(first, first + self.chunk_rows(chunk)))
        return out

    def close(self) -> None:
        """Unmap and close the file; doing it again changes nothing."""
        if self.closed:
            return
        self.closed = True
        if self._map is not None:
            with suppress(BufferError):  # an error's traceback still holds a part of it, and frees it when it goes
                self._map.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, offset: int, size: int) -> memoryview:
        if self._map is not None:
            return memoryview(self._map)[offset : offset + size]
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise CorruptError(f"{len(data)} bytes could be read at {offset}; {size} are due.")
        return memoryview(data)

    @contextmanager
    def _named(self, chunk: str = "") -> Iterator[None]:
        try:
            yield
        except CorruptError as error:
            raise CorruptError(f"{self.path}: {chunk}{error}") from None


def open_file(path: Path) -> int:
    """Open a file to be read, without waiting where it is a pipe; raises NotFoundError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing.") from None
    except OSError as error:
        raise NotFoundError(f"{path} cannot be opened: {error.strerror}.") from None


@contextmanager
def _closed_on_error(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise
