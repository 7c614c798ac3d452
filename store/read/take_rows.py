"""Rows by number: any rows of an array, in any order, from the chunks that hold them.

Each chunk that holds a row is decoded once, on a few threads. So rows that lie together are cheap, and a thousand
scattered rows cost a thousand chunks; for whole passes use `Site.batches` or `Site.in_order`.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsae.store.codec.chunks import unsigned
from gsae.store.format.row_order import Ints

from .shard_file import ShardFile

Index = int | slice | ArrayLike  # a torch.Tensor of integers is an ArrayLike too


def resolve_index(index: Index, rows: int) -> Ints:
    """Return the row numbers (n,) that an index of an array of `rows` rows means. Raises IndexError.

    index: an integer, a slice, an array or tensor of integers (negative ones count from the end), or of `rows` bools.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(rows), dtype=np.int64)
    given = np.asarray(index)
    if given.dtype == np.bool_ and given.shape == (rows,):
        return np.flatnonzero(given)
    if (given.size and given.dtype.kind not in "iu") or given.ndim > 1:
        raise IndexError(f"Rows are an integer, a slice or a list of integers; got {given.dtype} {given.shape}.")
    numbers = given.reshape(-1).astype(np.int64)
    outside = (numbers < -rows) | (numbers >= rows)
    if outside.any():
        raise IndexError(f"Row {numbers[outside][0]} does not exist: there are {rows} rows.")
    return np.where(numbers < 0, numbers + rows, numbers)


def take(files: Sequence[ShardFile], rows: Ints, threads: int) -> NDArray[Any]:
    """Return rows (n,), counted through `files`, as bit patterns (n, width) in the given order.

    Raises as `ShardFile.open` and `ShardReader`.
    """
    spec = files[0].spec
    out = np.empty((len(rows), spec.width), unsigned(spec.dtype))
    starts = np.cumsum([0, *(file.rows for file in files)])
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], starts)
    with ThreadPoolExecutor(threads, thread_name_prefix="gsae-rows") as pool:
        for number, file in enumerate(files):
            mine = order[bounds[number] : bounds[number + 1]]
            if len(mine):
                _take_of_file(file, rows[mine] - starts[number], mine, out, pool)
    return out


def _take_of_file(file: ShardFile, rows: Ints, to: Ints, out: NDArray[Any], pool: ThreadPoolExecutor) -> None:
    """Put rows (n,), ascending, of one file into rows `to` (n,) of out."""
    chunks, first = np.unique(rows // file.spec.chunk_rows, return_index=True)
    parts = list(
        zip(chunks.tolist(), np.split(rows % file.spec.chunk_rows, first[1:]), np.split(to, first[1:]), strict=True)
    )
    scratch = threading.local()
    with ExitStack() as stack:
        shard = stack.enter_context(file.open())

        def take_part(part: tuple[int, Ints, Ints]) -> None:
            chunk, within, places = part
            chunk_rows = shard.rows_of_chunk(chunk)
            if not hasattr(scratch, "rows") or len(scratch.rows) != chunk_rows:
                scratch.rows = np.empty((chunk_rows, out.shape[1]), out.dtype)
            shard.decode_into(chunk, scratch.rows, np.arange(chunk_rows))
            out[places] = scratch.rows[within]

        for chunk, _, _ in parts:
            shard.will_need(chunk)
        list(pool.map(take_part, parts))
