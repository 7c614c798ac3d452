"""A features folder's Parquet files as plain values for JSON: latents with their examples, contexts, texts of tokens.

Everything is streamed by row groups, so memory does not grow with the number of latents. Floats are rounded to four
significant digits, as many as a page shows, which halves the bytes; exporters ask for the exact values.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .parquet import arrow, contexts_schema, examples_schema, latents_schema, vocabulary_schema
from .reader import damaged, reading

DIGITS = 4
EXAMPLE = ("quantile", "context", "position", "value", "positions", "values")  # columns of an example, in this order
Latent = dict[str, Any]


def read_latents(
    folder: Path, only: Collection[int] | None = None, *, example: Collection[str] = EXAMPLE, exact: bool = False
) -> Iterator[Latent]:
    """Yield latents (those of `only`, if given) in order: the columns of each and `examples`, a list of lists.

    example: the columns of each example, in this order. exact: do not round floats. Raises CorruptError where a file is
    damaged, lacks a column, or its latents are not in order.
    """
    examples = _read_examples(folder / "examples.parquet", only, example, exact)
    waiting = next(examples, None)
    for columns in _groups(folder / "latents.parquet", latents_schema(), "latent", only, exact=exact):
        for values in zip(*columns.values(), strict=True):
            latent = dict(zip(columns, values, strict=True)) | {"examples": []}
            if waiting is not None and waiting[0] == latent["latent"]:
                latent["examples"], waiting = waiting[1], next(examples, None)
            yield latent
    if waiting is not None:
        raise damaged(folder / "examples.parquet", f"latent {waiting[0]} is out of order")


def in_batches(latents: Iterable[Latent], size: int) -> Iterator[list[Latent]]:
    """Yield `size` latents at a time, fewer at the end."""
    remaining = iter(latents)
    while batch := list(itertools.islice(remaining, size)):
        yield batch


def read_contexts(path: Path, only: Collection[int] | None = None) -> Iterator[tuple[int, list[int]]]:
    """Yield (context, token ids) of contexts.parquet in order."""
    for columns in _groups(path, contexts_schema(), "context", only):
        yield from zip(columns["context"], columns["token_ids"], strict=True)


def read_texts(path: Path) -> list[str | None]:
    """Return the text of every token id of vocabulary.parquet; None where an id has none."""
    texts: list[str | None] = []
    for columns in _groups(path, vocabulary_schema(), "token"):
        for token, text in zip(columns["token"], columns["text"], strict=True):
            texts += [None] * (token - len(texts))
            texts.append(text)
    return texts


def _read_examples(
    path: Path, only: Collection[int] | None, example: Collection[str], exact: bool
) -> Iterator[tuple[int, list[list[Any]]]]:
    """Yield each latent that has examples, with all of them, also where two row groups share them."""
    last: tuple[int, list[list[Any]]] | None = None
    for columns in _groups(path, examples_schema(), "latent", only, ("latent", *example), exact):
        for latent, *values in zip(*columns.values(), strict=True):
            if last is not None and last[0] != latent:
                yield last
                last = None
            last = last or (latent, [])
            last[1].append(values)
    if last is not None:
        yield last


def _groups(
    path: Path,
    schema: Any,
    key: str,
    only: Collection[int] | None = None,
    names: Collection[str] | None = None,
    exact: bool = False,
) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of each row group as lists. `key` must ascend; `only` holds the values of `key` to read."""
    pa, _ = arrow()
    names = list(names or schema.names)
    import pyarrow.compute as compute

    wanted = None if only is None else pa.array(sorted(only), schema.field(key).type)
    before = -1
    with reading(path) as file:
        for name in names:
            if file.schema_arrow.field(name).type != schema.field(name).type:
                raise damaged(path, f"its column {name!r} is {file.schema_arrow.field(name).type}")
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, names)
            if wanted is not None:
                table = table.filter(compute.is_in(table[key], wanted))
            columns = {name: _listed(table[name], exact) for name in names}
            keys = [before, *columns[key]]
            if any(a > b for a, b in itertools.pairwise(keys)):
                raise damaged(path, f"its column {key!r} does not ascend")
            before = keys[-1]
            yield columns


def _listed(column: Any, exact: bool) -> list[Any]:
    """Return a column as a list of values or lists; nulls are None."""
    pa, _ = arrow()
    array = column.combine_chunks()
    if not pa.types.is_list(array.type):
        return _plain(array, exact)
    values = _plain(array.flatten(), exact)
    lengths = array.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False).tolist()
    ends = np.cumsum(np.maximum(lengths, 0)).tolist()
    return [None if n < 0 else values[end - n : end] for n, end in zip(lengths, ends, strict=True)]


def _plain(array: Any, exact: bool) -> list[Any]:
    pa, _ = arrow()
    if pa.types.is_string(array.type):
        return list(array.to_pylist())
    values = array.fill_null(0).to_numpy(zero_copy_only=False)
    if pa.types.is_floating(array.type):
        if not np.isfinite(values).all():
            raise ValueError("a value is not finite")
        values = values.astype(np.float64)
        values = values if exact else shortened(values)
    found: list[Any] = values.tolist()
    if array.null_count:
        missing = array.is_null().to_numpy(zero_copy_only=False).tolist()
        found = [None if gone else value for gone, value in zip(missing, found, strict=True)]
    return found


def shortened(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return finite values rounded to DIGITS significant digits."""
    size = np.abs(values)
    place = DIGITS - 1 - np.floor(np.log10(np.where(size > 0, size, 1.0)))
    scale = 10.0 ** np.minimum(place, 300)
    # Dividing by a power of ten that a float holds exactly gives the float nearest to the short decimal.
    found: NDArray[np.float64] = np.where(
        place >= 0, np.round(values * scale) / scale, np.round(values * scale) * 10.0**-place
    )
    return found
