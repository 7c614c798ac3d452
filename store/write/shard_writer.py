"""The shard files of a window, encoded, hashed and summed on several threads, then published one after the other.

The chunks of all arrays stand in one queue, and a thread takes a chunk through every step: hash of the raw rows, sums,
encoding, crc, file and its hash. What must happen in chunk order passes a turnstile, one for each array and step; the
rest runs side by side. So every core is busy from the first chunk to the last, bytes do not depend on the number of
threads, and the memory beyond the rows is one chunk a thread.
"""

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
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
from gsae.store.format.moments import Moments, Sums, by_norm
from gsae.store.places.shard import Shard


@dataclass(frozen=True)
class NewShard:
    """Shard `number` of an array: rows (rows, width) or (rows,) as bit patterns; `summed` when it has moments."""

    spec: ArraySpec
    number: int
    rows: NDArray[Any]
    summed: bool = False


@dataclass(frozen=True)
class Published:
    """A shard file as it stands in the store, the rows in it, and their moments where they were asked for."""

    entry: ArrayEntry
    rows: NDArray[Any]
    moments: Moments | None


def write_shards(root: Path, shards: Sequence[NewShard], threads: int) -> list[Published]:
    """Write shard files together and publish them in the order given.

    Where a file of that name holds other bytes (two workers on hardware that differs), it is kept, and what is
    returned describes that file. Raises SpaceError when the disk is full; then nothing half-written stays.
    """
    for shard in shards:
        due = (shard.spec.rows_of_shard(shard.number), *shard.spec.shape[1:])
        if shard.rows.shape != due:
            raise ValueError(f"rows of {shard.spec.path} have shape {shard.rows.shape}; {due} are due")
    with disk_errors(root), ExitStack() as files:
        turnstiles = Turnstiles()
        lanes = [_Lane(shard, files.enter_context(temp_file(root)), turnstiles) for shard in shards]
        _run(lanes, turnstiles, threads)
        return [lane.publish(root) for lane in lanes]


class Turnstiles:
    """Let chunk n of an array pass a step when chunk n - 1 has passed, and nobody once something has failed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passed: Counter[tuple[str, int]] = Counter()
        self._failed = False

    @contextmanager
    def turn(self, step: str, array: int, chunk: int) -> Iterator[None]:
        """Wait until it is this chunk's turn, and let the next one in at the end."""
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
        """Send everybody home."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


class _StoppedError(Exception):
    """Another thread failed, and tells why."""


class _Lane:
    """One shard file in the making."""

    def __init__(self, shard: NewShard, file: BinaryIO, turnstiles: Turnstiles) -> None:
        self.shard, self.spec = shard, shard.spec
        self.rows = np.ascontiguousarray(shard.rows)
        self.chunks = -(-len(self.rows) // self.spec.chunk_rows)
        self._file, self._turnstiles = file, turnstiles
        self._raw, self._packed = hashlib.sha256(), hashlib.sha256()
        self._sums = Sums(self.spec.width, self.spec.dtype) if shard.summed else None
        self._index: list[tuple[int, int]] = []
        self._size = 0

    def take(self, chunk: int) -> None:
        """Take a chunk through all steps."""
        first = chunk * self.spec.chunk_rows
        rows = self.rows[first : first + self.spec.chunk_rows]
        with self._turn("raw", chunk):
            self._raw.update(rows.data)
        if self._sums is not None:
            sorted_rows = by_norm(rows, self.spec.dtype)
            with self._turn("sums", chunk):
                self._sums.add(rows, sorted_rows)
        body, crc = self.spec.encode(self.spec.fill(rows))
        with self._turn("file", chunk):
            self._index.append((self._size, len(body) + len(crc)))
            self._append(body, crc)

    def publish(self, root: Path) -> Published:
        """End the file with its index and give it its name."""
        self._append(encode_index(self._index, self.spec.chunks_of_shard))
        name, sha256 = self.spec.file(self.shard.number), self._packed.hexdigest()
        if not publish(root, name, self._file, sha256):
            return _published_by_another(root, self.shard)
        file = FileEntry(path=name, size=self._size, sha256=sha256)
        entry = ArrayEntry(array=self.spec.path, rows=len(self.rows), raw_sha256=self._raw.hexdigest(), file=file)
        return Published(entry, self.rows, None if self._sums is None else self._sums.moments())

    def _turn(self, step: str, chunk: int) -> Any:
        return self._turnstiles.turn(step, id(self), chunk)

    def _append(self, *parts: bytes) -> None:
        start = self._size
        for part in parts:
            self._file.write(part)
            self._packed.update(part)
            self._size += len(part)
        write_back(self._file, start, self._size)


def _run(lanes: list[_Lane], turnstiles: Turnstiles, threads: int) -> None:
    """Take every chunk of every lane through its steps."""
    queue: SimpleQueue[tuple[_Lane, int]] = SimpleQueue()
    for chunk in range(max(lane.chunks for lane in lanes)):
        for lane in lanes:
            if chunk < lane.chunks:
                queue.put((lane, chunk))

    def work() -> None:
        try:
            while True:
                lane, chunk = queue.get_nowait()
                lane.take(chunk)
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


def _published_by_another(root: Path, new: NewShard) -> Published:
    """Describe the file that is there in place of the one just written."""
    name = new.spec.file(new.number)
    with Shard(root, new.spec, new.number) as shard:
        rows = shard.read().view(new.rows.dtype).reshape(new.rows.shape)
    file = FileEntry(path=name, size=(root / name).stat().st_size, sha256=hash_file(root / name))
    entry = ArrayEntry(array=new.spec.path, rows=len(rows), raw_sha256=raw_sha256([rows]), file=file)
    return Published(entry, rows, Moments.of(rows, new.spec.dtype) if new.summed else None)


def all_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
