"""Token ids of documents: encoded by a copy of the model's tokenizer, or taken as they are from a text of ids.

The copy is made from the JSON of the tokenizer, and the plan has the hash of that JSON. Strings of special tokens are
ordinary text: `<|im_start|>` in a document is encoded as characters. About 100 bytes are held for each token of 2^22
characters, or of the longest document.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import UsageError

from .document import Content

ENCODED_CHARACTERS = 1 << 22

Tokens = NDArray[np.int32]
Encode = Callable[[list[Content]], list[Tokens]]


@dataclass(frozen=True)
class SpecialIds:
    """A tokenizer's BOS and EOS, and all ids that never give a row, ascending."""

    bos_id: int | None
    eos_id: int
    excluded_ids: tuple[int, ...]

    @property
    def first(self) -> int:
        """The first token of every context: BOS, or EOS if the tokenizer has no BOS."""
        return self.eos_id if self.bos_id is None else self.bos_id


def special_ids(tokenizer: Any) -> SpecialIds:
    """Return the special ids of a transformers tokenizer. Raises UsageError if it has no EOS."""
    if tokenizer.eos_token_id is None:
        raise UsageError("This tokenizer has no end-of-sequence token, which is needed to join documents.")
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return SpecialIds(
        tokenizer.bos_token_id, tokenizer.eos_token_id, tuple(sorted(added | set(tokenizer.all_special_ids)))
    )


def encoder(tokenizer: Any) -> Encode:
    """Return a function that gives the token ids (tokens,) of each of a list of documents.

    It raises UsageError for token ids that the tokenizer does not have.
    """
    backend, vocabulary = copy.deepcopy(tokenizer.backend_tokenizer), len(tokenizer)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode_texts(texts: list[str]) -> Iterator[Tokens]:
        for few in _by_characters(texts):
            for encoding in backend.encode_batch_fast(few, add_special_tokens=False):
                yield np.asarray(encoding.ids, np.int32)

    def encode(contents: list[Content]) -> list[Tokens]:
        texts = encode_texts([content for content in contents if isinstance(content, str)])
        return [next(texts) if isinstance(content, str) else _checked(content, vocabulary) for content in contents]

    return encode


def _by_characters(texts: list[str]) -> Iterator[list[str]]:
    few: list[str] = []
    characters = 0
    for text in texts:
        if few and characters + len(text) > ENCODED_CHARACTERS:
            yield few
            few, characters = [], 0
        few.append(text)
        characters += len(text)
    if few:
        yield few


def _checked(ids: Tokens, vocabulary: int) -> Tokens:
    if len(ids) and int(ids.max()) >= vocabulary:
        raise UsageError(f"The text has token id {ids.max()}; the model's tokenizer has ids 0 to {vocabulary - 1}.")
    return ids
