"""The documents of a local text in shuffled order: copied once to a temporary file, from which they are then taken.

The file is in the cache of `datasets`, because the folder for temporary files is often in memory. It has no name, so
that nothing is left when the process is killed. The cost is the text once more on disk while it is read.
"""

import mmap
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from gsae.errors import SpaceError

from .document import Document
from .shuffling import shuffled_ids

ROWS = 256


def shuffled_as_a_whole(documents: Iterator[Document], seed: int, tokenised: bool) -> Iterator[Document]:
    """Yield the documents, numbered from 0 without gaps, in the order of a seed. Raises SpaceError."""
    from datasets import config
    from pyarrow import ipc, py_buffer

    folder = Path(config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below
    except OSError as error:
        raise SpaceError(f"{folder} cannot hold a copy of the text to shuffle: {error.strerror}.") from None
    with file:
        count = _copy(documents, file, tokenised, folder)
        if not count:
            return
        reader = ipc.open_file(py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        for number in shuffled_ids(count, seed):
            yield _row(reader, number, tokenised)


def _copy(documents: Iterator[Document], file: IO[bytes], tokenised: bool, folder: Path) -> int:
    """Write the documents as record batches of ROWS and return how many they are."""
    import pyarrow

    content = pyarrow.list_(pyarrow.int32()) if tokenised else pyarrow.string()
    schema = pyarrow.schema({"content": content, "bad": pyarrow.string()})
    count = 0
    try:
        with pyarrow.ipc.new_file(file, schema) as writer:
            while few := list(islice(documents, ROWS)):
                held = [None if document.bad else document.content for document in few]
                writer.write_batch(pyarrow.record_batch([pyarrow.array(held, content), [d.bad for d in few]], schema))
                count += len(few)
        file.flush()
    except OSError as error:
        raise SpaceError(f"{folder} cannot hold a copy of the text to shuffle: {error.strerror}.") from None
    return count


def _row(reader: Any, number: int, tokenised: bool) -> Document:
    batch = reader.get_batch(number // ROWS)
    content, bad = (batch.column(name)[number % ROWS] for name in ("content", "bad"))
    if bad.is_valid:
        return Document(number, "", bad=bad.as_py())
    value = content.values.to_numpy().astype(np.int32) if tokenised else content.as_py()
    return Document(number, value)
