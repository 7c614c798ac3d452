"""The formats of local text files, by their endings, and how a compressed one is opened.

Decompression checks the end of the file, so that a file that was cut off is never read as a shorter text.
"""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

Format = Literal["json lines", "json", "csv", "txt", "parquet", "arrow"]

PLAIN: dict[str, Format] = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "txt",
}
COLUMNAR: dict[str, Format] = {".parquet": "parquet", ".arrow": "arrow"}
BUFFER_BYTES = 1 << 20


def _zstd(path: Path) -> IO[bytes]:
    from pyarrow import CompressedInputStream  # unlike zstandard's reader, it reports a file that was cut off

    return io.BufferedReader(cast(io.RawIOBase, CompressedInputStream(str(path), "zstd")), BUFFER_BYTES)


def _opener(compressed: Callable[[Path], object]) -> Callable[[Path], IO[bytes]]:
    return lambda path: cast(IO[bytes], compressed(path))


COMPRESSIONS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": _opener(gzip.open),
    ".zst": _zstd,
    ".bz2": _opener(bz2.open),
    ".xz": _opener(lzma.open),
}
NAMES = f"{', '.join(PLAIN)} (also {', '.join(COMPRESSIONS)}), {', '.join(COLUMNAR)}"


@dataclass(frozen=True)
class FileFormat:
    """What an ending says: the format, the ending without compression, and that of the compression or ""."""

    format: Format
    ending: str
    compression: str = ""


def format_of(name: str) -> FileFormat | None:
    """Return the format of a file by its name; None if it is not known."""
    for ending, format in (PLAIN | COLUMNAR).items():
        if name.endswith(ending):
            return FileFormat(format, ending)
        for compression in COMPRESSIONS if ending in PLAIN else ():
            if name.endswith(ending + compression):
                return FileFormat(format, ending, compression)
    return None


def open_bytes(path: Path, compression: str) -> IO[bytes]:
    """Open a file for reading its content, decompressed."""
    return COMPRESSIONS[compression](path) if compression else path.open("rb", BUFFER_BYTES)
