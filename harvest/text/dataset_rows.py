"""Documents from the rows of a table or stream of the library `datasets`, which reads files and the Hub.

Streams are read 256 rows at a time, so that a text is never held as a whole. Every failure is one line that names the
text and the row, because the library raises the types of arrow, the Hub, the system and its own.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import UsageError
from gsae.harvest.hub import explain, one_line, quiet

from .document import Content, Document

ROWS_AT_A_TIME = 256


def load_rows(dataset: str, builder: str, **options: Any) -> Any:
    """Return what `datasets.load_dataset(builder, **options)` gives, None for a file without any row.

    dataset: the name in error messages. Raises NotFoundError or UsageError.
    """
    with quiet(bars=options["streaming"]):
        from datasets import load_dataset

        try:
            return load_dataset(builder, **options)
        except StopIteration:  # what the json builder raises for a file without a line
            return None
        except Exception as error:  # arrow's, the Hub's, the system's and its own types
            raise explain("dataset", dataset, _cause(error)) from None


def _cause(error: Exception) -> Exception:
    """Return the cause of a DatasetGenerationError, which says only that something failed; else the error itself."""
    cause = error.__cause__
    return cause if type(error).__name__ == "DatasetGenerationError" and isinstance(cause, Exception) else error


def read_rows(dataset: str, field: str, tokenised: bool, table: Any, ids: Iterable[int]) -> Iterator[Document]:
    """Yield the documents in `field` of a table or stream of `datasets`; None has no rows.

    dataset: the name in error messages. ids: the number of each row in the source. Raises UsageError for a missing
    field, a row of another type, and a file that cannot be read.
    """
    content: Callable[[Any], Content | None] = _token_ids if tokenised else _text
    needed = "a list of token ids is needed" if tokenised else "text is needed (for token ids: --token-field)"
    batches = iter(()) if table is None else table.iter(batch_size=ROWS_AT_A_TIME)
    following, row = iter(ids), 0
    while True:
        with quiet():
            try:
                batch = next(batches, None)
            except UnicodeDecodeError:
                raise UsageError(f"Text {dataset!r} is not UTF-8 (after row {row}).") from None
            except Exception as error:  # arrow's, the Hub's, the system's and its own types
                raise UsageError(f"Text {dataset!r} cannot be read after row {row}: {one_line(error)}.") from None
        if batch is None:
            return
        if field not in batch:
            raise UsageError(f"Text {dataset!r} has no field {field!r}. It has: {', '.join(sorted(batch))}.")
        for value, id in zip(batch[field], following, strict=False):
            held = content(value)
            if held is None:
                found = "nothing" if value is None else f"a value of type {type(value).__name__}"
                raise UsageError(f"Text {dataset!r}, row {id}: field {field!r} holds {found}; {needed}.")
            yield Document(id, held)
            row += 1


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _token_ids(value: Any) -> NDArray[np.int32] | None:
    if not isinstance(value, list):
        return None
    try:
        ids = np.asarray(value or np.empty(0, np.int64))
    except ValueError:  # lists of different lengths
        return None
    fits = ids.ndim == 1 and ids.dtype.kind in "iu" and (not len(ids) or 0 <= ids.min() <= ids.max() < 1 << 31)
    return ids.astype(np.int32) if fits else None
