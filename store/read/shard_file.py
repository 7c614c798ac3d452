"""One window of an array, as a file that can be opened: where it is, and what the manifest says of it.

It is small and can be pickled, so a list of them is what a stream of batches is sent to another process as.
"""

from dataclasses import dataclass

from gsae.store.codec.chunks import ArraySpec
from gsae.store.format.manifest import FileEntry
from gsae.store.places.place import Readable
from gsae.store.places.shard import IO, ShardReader


@dataclass(frozen=True)
class ShardFile:
    """Shard `number` of the array `spec`; entry: its file in `place`."""

    place: Readable
    spec: ArraySpec
    number: int
    entry: FileEntry
    io: IO

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.spec.rows_of_shard(self.number)

    @property
    def chunks(self) -> int:
        """Number of chunks with at least one row."""
        return -(-self.rows // self.spec.chunk_rows)

    def open(self) -> ShardReader:
        """Open the file; if the store is remote, it is fetched first. Raises as `Readable.open` and `ShardReader`."""
        return ShardReader(self.place.open(self.entry), self.spec, self.number, size=self.entry.size, io=self.io)
