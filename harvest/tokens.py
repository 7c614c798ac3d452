"""Documents to contexts: which are held out, how they are packed, where tokenising stops.

Text is taken in blocks of 1024 documents and each split of a block is packed by itself, so a block's contexts
depend on nothing else and tokenising can be spread or resumed. The price is one padded context per block and
split, and documents that share a context attend to one another across an EOS. Tokens are held in memory, four
bytes each.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.store import UsageError, order

BLOCK_DOCUMENTS = 1024
TRAIN, HELDOUT = 0, 1

Ints = NDArray[np.int64]
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class SpecialIds:
    """A tokenizer's begin and end, and all ids that are never rows, ascending."""

    bos_id: int | None
    eos_id: int
    excluded_ids: tuple[int, ...]

    @property
    def first(self) -> int:
        """The token that every context begins with: BOS, or EOS where there is no BOS."""
        return self.eos_id if self.bos_id is None else self.bos_id


@dataclass(frozen=True)
class Contexts:
    """A text as the language model sees it, all contexts in source order.

    tokens: int32 (contexts, context_size). split: uint8 (contexts,), 0 train, 1 held out.
    document_start: int64 (documents,) flat index into `tokens` of each document's first token, ascending;
    document_id: int64 (documents,) its place in the source; document_split: uint8 (documents,).
    documents_read: documents taken from the source, empty ones included. ended_early: the text had fewer
    train rows than were asked for.
    """

    tokens: Tokens
    split: NDArray[np.uint8]
    document_start: Ints
    document_id: Ints
    document_split: NDArray[np.uint8]
    documents_read: int
    ended_early: bool


@dataclass(frozen=True)
class BlockTokenised:
    """Progress after each block: documents read, contexts and train rows made so far."""

    documents: int
    contexts: int
    rows: int


def special_ids(tokenizer: Any) -> SpecialIds:
    """Return what is special to a transformers tokenizer. Raises UsageError where it has no EOS."""
    if tokenizer.eos_token_id is None:
        raise UsageError("This tokenizer has no end-of-sequence token, which is needed to join documents.")
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return SpecialIds(
        tokenizer.bos_token_id, tokenizer.eos_token_id, tuple(sorted(added | set(tokenizer.all_special_ids)))
    )


def tokenise(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    context_size: int,
    rows: int | None,
    heldout: float,
    seed: int,
    dropped_positions: tuple[int, ...] = (),
    first: int = 0,
    listen: Callable[[BlockTokenised], None] = lambda event: None,
) -> Contexts:
    """Turn `documents` into contexts until they hold `rows` train rows (None: all the text).

    heldout: share of the documents that are held out. first: the first document's place in the source. Raises
    UsageError where no train row comes out.
    """
    special = special_ids(tokenizer)
    blocks: list[_Block] = []
    read = found = contexts = 0
    source = iter(documents)
    while texts := list(islice(source, BLOCK_DOCUMENTS)):
        ids = _encode(tokenizer, texts)
        held = np.array([is_held_out(text, heldout, seed) for text in texts])
        block = _pack_block(ids, held, first + read, context_size, special)
        counts = _rows(block, special, dropped_positions)
        if rows is not None and found + int(counts.sum()) >= rows:
            block = _without_surplus(block, counts, rows - found)
            counts = _rows(block, special, dropped_positions)
        blocks.append(block)
        read, found, contexts = read + len(texts), found + int(counts.sum()), contexts + len(block.tokens)
        listen(BlockTokenised(read, contexts, found))
        if rows is not None and found >= rows:
            break
    if not found:
        raise UsageError(
            f"The text gives no train rows: {read} documents, {contexts} contexts, a share of {heldout:g} "
            f"of the documents held out. More documents or a smaller share are needed."
        )
    return _joined(blocks, context_size, read, rows is not None and found < rows)


def is_held_out(text: str, heldout: float, seed: int) -> bool:
    """Say whether a document is held out; equal texts always fall on the same side."""
    index = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return order.word(seed, order.Stream.HELDOUT, index) < int(heldout * 2**64)


def pack(documents: list[Tokens], context_size: int, first: int, eos: int) -> tuple[Tokens, Ints]:
    """Lay token lists end to end, joined by `eos`, and cut them into contexts that begin with `first`.

    Returns the contexts, int32 (contexts, context_size), the last one padded with `eos`, and the flat index
    of each document's first token, (documents,). Documents must not be empty.
    """
    if not documents:
        return np.empty((0, context_size), np.int32), np.empty(0, np.int64)
    body = context_size - 1
    lengths = np.array([len(d) + 1 for d in documents], np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)[:-1]])
    used = int(lengths.sum()) - 1  # no EOS is needed after the last
    stream = np.full(-(-used // body) * body, eos, np.int32)
    for start, document in zip(starts.tolist(), documents, strict=True):
        stream[start : start + len(document)] = document
    tokens = np.empty((len(stream) // body, context_size), np.int32)
    tokens[:, 0] = first
    tokens[:, 1:] = stream.reshape(-1, body)
    return tokens, starts // body * context_size + 1 + starts % body


@dataclass(frozen=True)
class _Block:
    """Contexts of one block, train first, as in `Contexts`; starts count from the block's first token."""

    tokens: Tokens
    split: NDArray[np.uint8]
    start: Ints
    id: Ints
    document_split: NDArray[np.uint8]


def _encode(tokenizer: Any, texts: list[str]) -> list[Tokens]:
    # `split_special_tokens`: '<|im_start|>' in a text is ordinary; `verbose` would warn of long documents.
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]


def _pack_block(
    ids: list[Tokens], held: NDArray[np.bool_], first_id: int, context_size: int, special: SpecialIds
) -> _Block:
    tokens, splits, starts, names, document_splits = [], [], [], [], []
    before = 0
    for split in (TRAIN, HELDOUT):
        mine = [i for i, one in enumerate(ids) if len(one) and held[i] == split]
        packed, start = pack([ids[i] for i in mine], context_size, special.first, special.eos_id)
        tokens.append(packed)
        splits.append(np.full(len(packed), split, np.uint8))
        starts.append(start + before)
        names.append(np.array(mine, np.int64) + first_id)
        document_splits.append(np.full(len(mine), split, np.uint8))
        before += packed.size
    cat = np.concatenate
    return _Block(cat(tokens), cat(splits), cat(starts), cat(names), cat(document_splits))


def _rows(block: _Block, special: SpecialIds, dropped_positions: tuple[int, ...]) -> Ints:
    """Return the number of rows of each train context of a block, (train contexts,)."""
    train = block.tokens[block.split == TRAIN]
    counts: Ints = order.row_mask(train, special.excluded_ids, dropped_positions).sum(axis=1, dtype=np.int64)
    return counts


def _without_surplus(block: _Block, counts: Ints, wanted: int) -> _Block:
    """Drop train contexts from the end of a block while the others hold at least `wanted` rows."""
    kept = int(np.searchsorted(np.cumsum(counts), wanted)) + 1
    context_size = block.tokens.shape[1]
    cut, resume = kept * context_size, len(counts) * context_size
    stays = (block.start < cut) | (block.start >= resume)
    start = block.start[stays]
    contexts = np.r_[0:kept, len(counts) : len(block.tokens)]
    return _Block(
        block.tokens[contexts],
        block.split[contexts],
        np.where(start >= resume, start - (resume - cut), start),
        block.id[stays],
        block.document_split[stays],
    )


def _joined(blocks: list[_Block], context_size: int, read: int, ended_early: bool) -> Contexts:
    ends = np.cumsum([b.tokens.size for b in blocks])
    offsets = [0, *ends[:-1].tolist()]
    return Contexts(
        tokens=np.concatenate([b.tokens for b in blocks]),
        split=np.concatenate([b.split for b in blocks]),
        document_start=np.concatenate([b.start + offset for b, offset in zip(blocks, offsets, strict=True)]),
        document_id=np.concatenate([b.id for b in blocks]),
        document_split=np.concatenate([b.document_split for b in blocks]),
        documents_read=read,
        ended_early=ended_early,
    )
