"""The shard files of a window: encoded, hashed and summed on several threads, then published together.

The chunks of all arrays are in one queue, and a thread takes a chunk through every step: hash of the raw rows, moments,
encoding, crc, file and its hash. Steps that must run in the order of chunks pass a turnstile, one for each array and
step; the others run in parallel. So all cores are busy to the last chunk, bytes do not depend on the number of
threads, and the memory beyond the rows is one chunk a thread. Once the files are encoded the rows are not needed any
more, so their memory can be filled again while the disk still writes.
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

from gsae.files import NewFile, disk_errors, hash_file, publish_together, temp_file, write_back
from gsae.store.codec.chunks import ArraySpec, encode_index, raw_sha256
from gsae.store.codec.row_codec import Encoded
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
    """A published shard file: its entry, and the moments of its rows if they were to be computed."""

    entry: ArrayEntry
    moments: Moments | None


def write_shards(
    root: Path, shards: Sequence[ShardRows], threads: int, approve: Approve = lambda moments: None
) -> list[WrittenShard]:
    """Encode shard files and publish them together; arguments and errors are those of both steps."""
    return encode_shards(root, shards, threads, approve).publish()


def encode_shards(
    root: Path, shards: Sequence[ShardRows], threads: int, approve: Approve = lambda moments: None
) -> "EncodedShards":
    """Encode shard files into temporary files of `root`; their rows may change once this has returned.

    approve: gets the moments of the shards that have them, in order; if it raises, nothing is kept. Raises SpaceError
    if the disk is full; no incomplete file stays. Raises ValueError for rows of another shape than the array's.
    """
    for shard in shards:
        needed = (shard.spec.rows_of_shard(shard.number), *shard.spec.shape[1:])
        if shard.rows.shape != needed:
            raise ValueError(f"rows of {shard.spec.path} have shape {shard.rows.shape}; {needed} are needed")
    with disk_errors(root), ExitStack() as files:
        turnstiles = Turnstiles()
        writers = [_ShardWriter(shard, files.enter_context(temp_file(root)), turnstiles) for shard in shards]
        _run(writers, turnstiles, threads)
        encoded = [writer.finish() for writer in writers]
        approve([shard.moments for shard in encoded if shard.moments is not None])
        return EncodedShards(root, encoded, threads, files.pop_all())


class EncodedShards:
    """Shard files in temporary files, to be published once."""

    def __init__(self, root: Path, shards: Sequence["_EncodedShard"], threads: int, files: ExitStack) -> None:
        self._root, self._shards, self._threads, self._files = root, shards, threads, files

    def publish(self) -> list[WrittenShard]:
        """Publish the files together and remove the temporary ones, after an error too.

        If a file of that name has different bytes (two workers on different hardware), it is left unchanged, and the
        result describes that file. Raises SpaceError if the disk is full.
        """
        with disk_errors(self._root), self._files:
            new = [NewFile(s.entry.file.path, s.file, s.entry.file.sha256) for s in self._shards]
            ours = publish_together(self._root, new, self._threads)
            return [
                WrittenShard(shard.entry, shard.moments) if own else _published_by_another(self._root, shard)
                for shard, own in zip(self._shards, ours, strict=True)
            ]


@dataclass(frozen=True)
class _EncodedShard:
    """A shard in a temporary file: what its entry will be if no other worker has published that shard."""

    spec: ArraySpec
    number: int
    file: BinaryIO
    entry: ArrayEntry
    moments: Moments | None


class Turnstiles:
    """Let chunk n of an array pass a step after chunk n - 1 has passed, and no chunk after a failure.

    Only the thread with the next chunk is woken, because each thread that wakes takes Python's lock from the thread
    that launches the passes of a model.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passed: Counter[tuple[str, int]] = Counter()
        self._waiting: dict[tuple[str, int, int], threading.Condition] = {}
        self._failed = False

    @contextmanager
    def turn(self, step: str, array: int, chunk: int) -> Iterator[None]:
        """Wait until all chunks before this one have passed the step; let the next one pass at the end."""
        at = (step, array)
        with self._lock:
            if not self._failed and self._passed[at] != chunk:
                self._wait(at, chunk)
            if self._failed:
                raise _StoppedError
        yield
        with self._lock:
            self._passed[at] += 1
            if following := self._waiting.get((*at, chunk + 1)):
                following.notify()

    def fail(self) -> None:
        """Stop every thread at its next turn."""
        with self._lock:
            self._failed = True
            for waiting in self._waiting.values():
                waiting.notify()

    def _wait(self, at: tuple[str, int], chunk: int) -> None:
        """Wait, with the lock released meanwhile, for the turn of a chunk or a failure."""
        waiting = self._waiting[*at, chunk] = threading.Condition(self._lock)
        waiting.wait_for(lambda: self._failed or self._passed[at] == chunk)
        del self._waiting[*at, chunk]


class _StoppedError(Exception):
    """Another thread failed and raises the reason."""


class _ShardWriter:
    """A shard file that is being encoded."""

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

    def finish(self) -> _EncodedShard:
        """Append the index, and return what is known of the file without its rows."""
        self._append(encode_index(self._index, self.spec.chunks_of_shard))
        number, moments = self.shard.number, None if self._moments is None else self._moments.moments()
        file = FileEntry(path=self.spec.file(number), size=self._size, sha256=self._packed.hexdigest())
        entry = ArrayEntry(array=self.spec.path, rows=len(self.rows), raw_sha256=self._raw.hexdigest(), file=file)
        return _EncodedShard(self.spec, number, self._file, entry, moments)

    def _turn(self, step: str, chunk: int) -> Any:
        return self._turnstiles.turn(step, id(self), chunk)

    def _append(self, *parts: Encoded) -> None:
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


def _published_by_another(root: Path, new: _EncodedShard) -> WrittenShard:
    """Describe the file that another worker published under the name of the one just encoded."""
    name = new.entry.file.path
    with open_shard(root, new.spec, new.number) as shard:
        rows = shard.read()
    file = FileEntry(path=name, size=(root / name).stat().st_size, sha256=hash_file(root / name))
    entry = ArrayEntry(array=new.spec.path, rows=len(rows), raw_sha256=raw_sha256([rows]), file=file)
    return WrittenShard(entry, None if new.moments is None else Moments.of(rows, new.spec.dtype))


def all_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
