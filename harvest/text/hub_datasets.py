"""A data set on the Hugging Face Hub, streamed and pinned to a commit; one row is one document.

Nothing is downloaded as a whole, so a shuffled data set is permuted in blocks of 2^14 documents, in memory.
"""

from functools import partial

from gsae.harvest.hub import pin
from gsae.store import DatasetSource

from .dataset_rows import load_rows, read_rows
from .document import Text, TextRequest
from .shuffling import SHUFFLE_WITHIN, shuffled_in_blocks

FORM = "a Hub id (owner/name, or owner/name:config)"


def serves(dataset: str) -> bool:
    """Return whether `dataset` may be a Hub id: anything but a builtin."""
    return not dataset.startswith("builtin:")


def open_text(request: TextRequest) -> Text:
    """Return the text. Raises NotFoundError if the Hub has no such data set or cannot be reached."""
    repository, _, config = request.dataset.partition(":")
    commit = pin("dataset", repository, request.revision)
    stream = load_rows(request.dataset, repository, name=config or None, revision=commit, split=request.split)
    source = DatasetSource(
        id=request.dataset, revision=commit, split=request.split, text_field=request.field, sha256=None
    )
    rows = partial(read_rows, request.dataset, request.field, request.tokenised)
    seed = request.shuffle_seed
    if seed is None:
        return Text(source, lambda: rows(stream))
    in_blocks = source.model_copy(update={"shuffle_within": SHUFFLE_WITHIN})
    return Text(in_blocks, lambda: shuffled_in_blocks(rows(stream), seed))
