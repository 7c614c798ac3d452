"""The shard files of a window: encoded, hashed and summed on several threads, then published one after the other.

The chunks of all arrays are in one queue, and a thread takes a chunk through every step: hash of the raw rows, moments,
encoding, crc, file and its hash. Steps that must run in the order of chunks pass a turnstile, one for each array and
step; the others run in parallel. So all cores are busy to the last chunk, bytes do not depend on the number of
threads, and the memory beyond the rows is one chunk a thread.
"""

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gsae.files import disk_errors, hash_file, publish, temp_file, write_back
from gsae.store.codec.chunks import ArraySpec, encode_index, raw_sha256
from gsae.store.format.manifest import ArrayEntry, FileEntry
from gsae.store.format.moments import Moments, MomentsBuilder, sort_by_norm
from gsae.store.places.shard import open_shard

Approve = Callable[[list[Moments]], None]


@dataclass(frozen=True)
class ShardRows:
    """The rows of shard `number` of an array: (rows, width) or (rows,), bit patterns.

    has_moments: whether their moments are to be computed.
    """

    spec: ArraySpec
    number: int
    rows: NDArray[Any]
    has_moments: bool = False


@dataclass(frozen=True)
class WrittenShard:
    """A published shard file: its entry, the rows in it, and their moments if they were to be computed."""

    entry: ArrayEntry
    rows: NDArray[Any]
    moments: Moments | None


def write_shards(
    root: Path, shards: Sequence[ShardRows], threads: int, approve: Approve = lambda moments: None
) -> list[WrittenShard]:
    """Write shard files together and publish them in the order given.

    If a file of that name has different bytes (two workers on different hardware), it is left unchanged, and the
    result describes that file. approve: gets the moments of the shards that have them, in order, before anything is
    published; if it raises, nothing is. Raises SpaceError if the disk is full; no incomplete file stays. Raises
    ValueError for rows of another shape than the array's.
    """
    for shard in shards:
        needed = (shard.spec.rows_of_shard(shard.number), *shard.spec.shape[1:])
        if shard.rows.shape != needed:
            raise ValueError(f"rows of {shard.spec.path} have shape {shard.rows.shape}; {needed} are needed")
    with disk_errors(root), ExitStack() as files:
        turnstiles = Turnstiles()
        writers = [_ShardWriter(shard, files.enter_context(temp_file(root)), turnstiles) for shard in shards]
        _run(writers, turnstiles, threads)
        approve([writer.moments() for writer in writers if writer.shard.has_moments])
        return [writer.publish(root) for writer in writers]


class Turnstiles:
    """Let chunk n of an array pass a step after chunk n - 1 has passed, and no chunk after a failure."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passed: Counter[tuple[str, int]] = Counter()
        self._failed = False

    @contextmanager
    def turn(self, step: str, array: int, chunk: int) -> Iterator[None]:
        """Wait until all chunks before this one have passed the step; let the next one pass at the end."""
        at = (step, array)
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._passed[at] == chunk)
            if self._failed:
                raise _StoppedError
        yield
        with self._changed:
            self._passed[at] += 1
            self._changed.notify_all()

    def fail(self) -> None:
        """Stop every thread at its next turn."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


class _StoppedError(Exception):
    """Another thread failed and raises the reason."""


class _ShardWriter:
    """A shard file that is being written."""

    def __init__(self, shard: ShardRows, file: BinaryIO, turnstiles: Turnstiles) -> None:
        self.shard, self.spec = shard, shard.spec
        self.rows = np.ascontiguousarray(shard.rows)
        self.chunks = -(-len(self.rows) // self.spec.chunk_rows)
        self._file, self._turnstiles = file, turnstiles
        self._raw, self._packed = hashlib.sha256(), hashlib.sha256()
        self._moments = MomentsBuilder(self.spec.width, self.spec.dtype) if shard.has_moments else None
        self._index: list[tuple[int, int]] = []
        self._size = 0

    def take(self, chunk: int) -> None:
        """Take a chunk through all steps."""
        first = chunk * self.spec.chunk_rows
        rows = self.rows[first : first + self.spec.chunk_rows]
        with self._turn("raw", chunk):
            self._raw.update(rows.data)
        if self._moments is not None:
            sorted_rows = sort_by_norm(rows, self.spec.dtype)
            with self._turn("moments", chunk):
                self._moments.add(rows, sorted_rows)
        body, crc = self.spec.encode(self.spec.fill(rows))
        with self._turn("file", chunk):
            self._index.append((self._size, len(body) + len(crc)))
            self._append(body, crc)

    def publish(self, root: Path) -> WrittenShard:
        """Append the index and publish the file."""
        self._append(encode_index(self._index, self.spec.chunks_of_shard))
        name, sha256 = self.spec.file(self.shard.number), self._packed.hexdigest()
        if not publish(root, name, self._file, sha256):
            return _published_by_another(root, self.shard)
        file = FileEntry(path=name, size=self._size, sha256=sha256)
        entry = ArrayEntry(array=self.spec.path, rows=len(self.rows), raw_sha256=self._raw.hexdigest(), file=file)
        return WrittenShard(entry, self.rows, self.moments() if self.shard.has_moments else None)

    def moments(self) -> Moments:
        """Return the moments of the rows taken so far."""
        assert self._moments is not None
        return self._moments.moments()

    def _turn(self, step: str, chunk: int) -> Any:
        return self._turnstiles.turn(step, id(self), chunk)

    def _append(self, *parts: bytes) -> None:
        start = self._size
        for part in parts:
            self._file.write(part)
            self._packed.update(part)
            self._size += len(part)
        write_back(self._file, start, self._size)


def _run(writers: list[_ShardWriter], turnstiles: Turnstiles, threads: int) -> None:
    """Take every chunk of every writer through its steps."""
    queue: SimpleQueue[tuple[_ShardWriter, int]] = SimpleQueue()
    for chunk in range(max(writer.chunks for writer in writers)):
        for writer in writers:
            if chunk < writer.chunks:
                queue.put((writer, chunk))

    def work() -> None:
        try:
            while True:
                writer, chunk = queue.get_nowait()
                writer.take(chunk)
        except (Empty, _StoppedError):
            return
        except BaseException:
            turnstiles.fail()
            raise

    if threads == 1:
        work()
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="gsae-encode") as pool:
        try:
            for worker in [pool.submit(work) for _ in range(threads)]:
                worker.result()
        except BaseException:
            turnstiles.fail()
            raise


def _published_by_another(root: Path, new: ShardRows) -> WrittenShard:
    """Describe the file that another worker published under the name of the one just written."""
    name = new.spec.file(new.number)
    with open_shard(root, new.spec, new.number) as shard:
        rows = shard.read().view(new.rows.dtype).reshape(new.rows.shape)
    file = FileEntry(path=name, size=(root / name).stat().st_size, sha256=hash_file(root / name))
    entry = ArrayEntry(array=new.spec.path, rows=len(rows), raw_sha256=raw_sha256([rows]), file=file)
    return WrittenShard(entry, rows, Moments.of(rows, new.spec.dtype) if new.has_moments else None)


def all_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
