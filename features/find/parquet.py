"""The Parquet files of a features folder: their columns, as docs/features.md lists them, and how they are written.

A row group holds 1,024 latents, contexts or tokens, so that readers need the memory of one row group at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import UsageError
from gsae.files import replacing

GROUP = 1024  # latents, contexts or tokens in a row group
CODEC = "zstd"


def arrow() -> tuple[ModuleType, ModuleType]:
    """Return pyarrow and pyarrow.parquet; raises UsageError where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("Parquet files need pyarrow: pip install 'gsae[features]'.") from None
    return pyarrow, pyarrow.parquet


def latents_schema() -> Any:
    """Return the schema of latents.parquet."""
    pa, _ = arrow()
    ints, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    return pa.schema(
        [
            pa.field("latent", pa.int32(), nullable=False),
            pa.field("rows", pa.int64(), nullable=False),
            pa.field("density", pa.float64(), nullable=False),
            ("max", pa.float32()),
            ("mean", pa.float32()),
            ("histogram", pa.list_(pa.int64())),
            ("quantile_edges", floats),
            ("top_token", pa.int32()),
            ("neighbours", ints),
            ("cosines", floats),
            ("promoted", ints),
            ("promoted_logits", floats),
            ("suppressed", ints),
            ("suppressed_logits", floats),
        ]
    )


def examples_schema() -> Any:
    """Return the schema of examples.parquet."""
    pa, _ = arrow()
    return pa.schema(
        [
            pa.field("latent", pa.int32(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            ("quantile", pa.int8()),
            pa.field("rank", pa.int16(), nullable=False),
            pa.field("context", pa.int64(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("value", pa.float32(), nullable=False),
            pa.field("positions", pa.list_(pa.int32()), nullable=False),
            pa.field("values", pa.list_(pa.float32()), nullable=False),
        ]
    )


def contexts_schema() -> Any:
    """Return the schema of contexts.parquet."""
    pa, _ = arrow()
    return pa.schema([("context", pa.int64()), ("token_ids", pa.list_(pa.int32()))])


def vocabulary_schema() -> Any:
    """Return the schema of vocabulary.parquet."""
    pa, _ = arrow()
    return pa.schema([("token", pa.int32()), ("text", pa.string())])


def lists(rows: Sequence[NDArray[Any] | None], kind: Any) -> Any:
    """Return an Arrow array of lists of `kind` from a numpy array, or None, for each row."""
    pa, _ = arrow()
    present = [row for row in rows if row is not None]
    flat = np.concatenate(present) if present else np.zeros(0)
    lengths = [0 if row is None else len(row) for row in rows]
    return ragged(lengths, flat, kind, pa.array([row is None for row in rows]))


def ragged(lengths: Sequence[int] | NDArray[np.int64], flat: NDArray[Any], kind: Any, missing: Any = None) -> Any:
    """Return an Arrow array of lists of `kind`: `flat` cut by lengths (rows,); missing: Arrow's mask of nulls."""
    pa, _ = arrow()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind), mask=missing)


@contextmanager
def writing(path: Path, schema: Any) -> Iterator[Any]:
    """Open a Parquet writer of row groups. The file gets its name once everything is written."""
    _, parquet = arrow()
    with replacing(path) as temporary, parquet.ParquetWriter(temporary, schema, compression=CODEC) as writer:
        yield writer


def write_vocabulary(path: Path, texts: Sequence[str]) -> None:
    """Write the text of every token id."""
    pa, _ = arrow()
    schema = vocabulary_schema()
    # A tokenizer may decode an id to half of a surrogate pair, which UTF-8 cannot encode.
    clean = [text.encode("utf-8", "replace").decode() for text in texts]
    with writing(path, schema) as writer:
        writer.write_table(pa.table([pa.array(range(len(clean)), pa.int32()), clean], schema=schema))


def write_contexts(path: Path, parts: Iterable[tuple[NDArray[np.int64], NDArray[np.int32]]]) -> None:
    """Write contexts (n,) with their tokens (n, context_size), a row group for each part."""
    pa, _ = arrow()
    schema = contexts_schema()
    with writing(path, schema) as writer:
        for contexts, tokens in parts:
            writer.write_table(pa.table([contexts, lists(list(tokens), pa.int32())], schema=schema))
