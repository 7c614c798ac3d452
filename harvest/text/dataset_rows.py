"""Documents from the rows of a stream of the library `datasets`, which reads the Hub.

Streams are read 256 rows at a time, so that a text is never held as a whole. Every failure is one line that names the
text and the row, because the library raises the types of arrow, the Hub, the system and its own.
"""

from collections.abc import Iterator
from typing import Any

from gsae.errors import UsageError
from gsae.harvest.hub import explain, one_line, quiet

from .document import Document
from .row_values import document_of, no_field

ROWS_AT_A_TIME = 256


def load_rows(dataset: str, repository: str, **options: Any) -> Any:
    """Return the stream of `datasets.load_dataset(repository, **options)`, None if it has no rows.

    dataset: the name in error messages. Raises NotFoundError or UsageError.
    """
    with quiet(bars=False):
        from datasets import load_dataset

        try:
            return load_dataset(repository, streaming=True, **options)
        except StopIteration:  # what the json builder raises for a file without a line
            return None
        except Exception as error:  # arrow's, the Hub's, the system's and its own types
            raise explain("dataset", dataset, _cause(error)) from None


def _cause(error: Exception) -> Exception:
    """Return the cause of a DatasetGenerationError, which says only that something failed; else the error itself."""
    cause = error.__cause__
    return cause if type(error).__name__ == "DatasetGenerationError" and isinstance(cause, Exception) else error


def read_rows(dataset: str, field: str, tokenised: bool, table: Any) -> Iterator[Document]:
    """Yield the documents in `field` of a stream of `datasets`; None has no rows.

    dataset: the name in error messages. Raises UsageError for a missing field, and for what cannot be read.
    """
    batches = iter(()) if table is None else table.iter(batch_size=ROWS_AT_A_TIME)
    row = 0
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
            raise UsageError(f"Text {dataset!r} has {no_field(field, batch)}.")
        for value in batch[field]:
            yield document_of(row, value, dataset, row, field, tokenised)
            row += 1
