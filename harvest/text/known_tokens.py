"""Whether the model's embedding has a row for every token of a text.

A tokenizer may have more ids than the embedding has rows, for instance when a token was added and the embedding was not
resized. That is harmless while the text has none of these ids, so each block of contexts is checked when it is made.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gsae.errors import UsageError

from .encoding import SpecialIds
from .packing import Block


@dataclass(frozen=True)
class KnownTokens:
    """The tokens that a model knows: ids below `rows`, the rows of its embedding; None if these are not known."""

    tokenizer: Any
    rows: int | None

    def check_special(self, special: SpecialIds) -> None:
        """Raise UsageError unless the tokens that begin contexts and join documents are known."""
        for number in (special.first, special.eos_id):
            if self.rows is not None and number >= self.rows:
                raise UsageError(f"The tokenizer's special token {self._fault(number)}")

    def check(self, block: Block) -> None:
        """Raise UsageError for the first document with an unknown token."""
        if self.rows is None or not block.tokens.size or int(block.tokens.max()) < self.rows:
            return
        tokens = block.tokens.ravel()
        unknown = np.flatnonzero(tokens >= self.rows)
        documents = block.id[np.searchsorted(block.start, unknown, side="right") - 1]
        first = int(documents.argmin())
        raise UsageError(
            f"Document {documents[first]} of the text has token {self._fault(int(tokens[unknown[first]]))}"
        )

    def _fault(self, number: int) -> str:
        name = self.tokenizer.convert_ids_to_tokens(number)
        return (
            f"{name!r} with id {number}, and the model's embedding has {self.rows} rows. Use the tokenizer that "
            "belongs to the model, or resize the embedding (resize_token_embeddings) and save both."
        )
