"""One field of each row of a table: a CSV, Parquet or Arrow file. The other columns of a columnar file are not read.

A CSV file is read by Python's own reader, which takes rows of any length and shows which row is broken; all of its
values are text. Of Parquet and Arrow files 256 rows are held as Python values at a time.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gsae.errors import UsageError

from .row_values import Broken, Value, no_field

ROWS_AT_A_TIME = 256
LONGEST_CSV_VALUE = 1 << 30


def csv_rows(file: IO[bytes], field: str, separator: str) -> Iterator[Value]:
    """Yield the field of each row of a CSV file, the names of which are in its first row."""
    csv.field_size_limit(LONGEST_CSV_VALUE)
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=separator, strict=True)
        names = next(rows, None)
        if names is None:
            return
        at = _place(field, names)
        for row in rows:
            if len(row) == len(names):
                yield row[at]
            elif row:
                yield Broken(f"{len(row)} values, where the first row has {len(names)} names")


def parquet_rows(path: Path, field: str) -> Iterator[Value]:
    """Yield the field of each row of a Parquet file."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        _place(field, file.schema_arrow.names)
        for batch in file.iter_batches(ROWS_AT_A_TIME, columns=[field]):
            yield from batch.column(field).to_pylist()


def arrow_rows(path: Path, field: str) -> Iterator[Value]:
    """Yield the field of each row of an Arrow file, of the format for streams (as `datasets` writes) or for files."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        at = _place(field, _open_arrow(file, None).schema.names)
        for batch in _batches(_open_arrow(file, pyarrow.ipc.IpcReadOptions(included_fields=[at]))):
            for first in range(0, batch.num_rows, ROWS_AT_A_TIME):
                yield from batch.column(0).slice(first, ROWS_AT_A_TIME).to_pylist()


def _place(field: str, names: list[str]) -> int:
    if field not in names:
        raise UsageError(no_field(field, names))
    return names.index(field)


def _open_arrow(file: Any, options: Any) -> Any:
    import pyarrow

    file.seek(0)
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file, options=options)


def _batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)
