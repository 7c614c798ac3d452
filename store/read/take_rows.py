"""Rows by number: any rows of an array, in any order, from the chunks that hold them.

Each chunk that is touched is decoded once, on a few threads, so rows that lie together are cheap and a thousand
scattered rows cost a thousand chunks: for whole passes there are `batches` and `in_order`.
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

from .decoding import ShardFile

Index = int | slice | ArrayLike  # a torch.Tensor of integers is an ArrayLike too


def numbers(index: Index, rows: int) -> Ints:
    """Return the row numbers (n,) that an index of an array of `rows` rows means; raises IndexError.

    index: an integer, a slice, an array or tensor of integers (negative ones count from the end), or of `rows` bools.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(rows), dtype=np.int64)
    given = np.asarray(index)
    if given.dtype == np.bool_ and given.shape == (rows,):
        return np.flatnonzero(given)
    if (given.size and given.dtype.kind not in "iu") or given.ndim > 1:
        raise IndexError(f"Rows are an integer, a slice or a list of integers; got {given.dtype} {given.shape}.")
    found = given.reshape(-1).astype(np.int64)
    outside = (found < -rows) | (found >= rows)
    if outside.any():
        raise IndexError(f"Row {found[outside][0]} is not there: there are {rows} rows.")
    return np.where(found < 0, found + rows, found)


def take(files: Sequence[ShardFile], rows: Ints, threads: int) -> NDArray[Any]:
    """Return rows (n,), counted through `files`, as bit patterns (n, width) in the order asked.

    Raises as `Shard` does.
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
    """Put rows (n,), ascending, of one file to rows `to` (n,) of out."""
    chunks, first = np.unique(rows // file.spec.chunk_rows, return_index=True)
    parts = list(
        zip(chunks.tolist(), np.split(rows % file.spec.chunk_rows, first[1:]), np.split(to, first[1:]), strict=True)
    )
    scratch = threading.local()
    with ExitStack() as stack:
        shard = stack.enter_context(file.open())

        def one(part: tuple[int, Ints, Ints]) -> None:
            chunk, within, places = part
            held = shard.chunk_rows(chunk)
            if not hasattr(scratch, "rows") or len(scratch.rows) != held:
                scratch.rows = np.empty((held, out.shape[1]), out.dtype)
            shard.decode_into(chunk, scratch.rows, np.arange(held))
            out[places] = scratch.rows[within]

        for chunk, _, _ in parts:
            shard.will_need(chunk)
        list(pool.map(one, parts))
