"""Documents to contexts: which documents are held out, how they are packed, and where packing stops.

Documents are taken in blocks of 1024, and each split of a block is packed alone. The contexts of a block therefore
depend on nothing else, and packing can start at any block and give the same bytes. The price is one padded context for
each block and split, and that documents in one context attend to one another across an EOS.

The tokenizer's own threads use all cores for the documents of a block (`RAYON_NUM_THREADS` limits them) and release
Python's lock. Two blocks are in work at a time, so that one is read, hashed and packed while another is encoded. Worker
processes would gain little, because all work outside the tokenizer is a few hundredths of the whole.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gsae.store import Stream, row_mask, word

from .document import Content, Document
from .encoding import Encode, SpecialIds, Tokens, encoder, special_ids

BLOCK_DOCUMENTS = 1024
AT_A_TIME = 2
TRAIN, HELDOUT = 0, 1

Ints = NDArray[np.int64]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Block:
    """The contexts of a block of documents as the language model reads them, train before held out.

    tokens: int32 (contexts, context_size). split: uint8 (contexts,), 0 train, 1 held out. start: int64 (documents,)
    flat index into `tokens` of each document's first token, ascending. id: int64 (documents,) its number in the source,
    which the parts of one document share.
    document_split: uint8 (documents,). read: documents taken from the source, with empty ones. rows: rows of the train
    and of the held-out contexts. again: whether some of the documents had been read before. bad: what is wrong with the
    rows that gave no document, each once however often the text is read.
    """

    tokens: Tokens
    split: NDArray[np.uint8]
    start: Ints
    id: Ints
    document_split: NDArray[np.uint8]
    read: int
    rows: tuple[int, int]
    again: bool
    bad: tuple[str, ...]


@dataclass(frozen=True)
class BlockTokenised:
    """Progress after a block: documents read, contexts and train rows made so far."""

    documents: int
    contexts: int
    rows: int


def tokenise(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    context_size: int,
    rows: int | None,
    heldout: float,
    seed: int,
    dropped_positions: tuple[int, ...] = (),
) -> Iterator[Block]:
    """Turn `documents` into blocks of contexts, in order, until they hold `rows` train rows (None: all documents).

    heldout: share of the documents that are held out. When documents are read again, the held-out ones are left out,
    because evaluating on a row twice tells nothing new. Raises UsageError for token ids that the tokenizer does not
    have.
    """
    special = special_ids(tokenizer)
    count_rows = partial(_count_rows, special=special, dropped_positions=dropped_positions)
    make_block = partial(
        _make_block,
        encode=encoder(tokenizer),
        special=special,
        count_rows=count_rows,
        context_size=context_size,
        heldout=heldout,
        seed=seed,
    )
    made = 0
    for block in _map_ahead(make_block, _blocks_of(documents)):
        enough = rows is not None and made + block.rows[TRAIN] >= rows
        yield _without_surplus(block, count_rows, rows - made) if rows is not None and enough else block
        made += block.rows[TRAIN]
        if enough:
            return


def is_held_out(content: Content, heldout: float, seed: int) -> bool:
    """Return whether a document is held out; equal documents always fall on the same side.

    content: of the document, or for the part of a document the name of the whole, so that all parts fall on one side.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content.astype("<i4").tobytes()
    index = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    return word(seed, Stream.HELDOUT, index) < int(heldout * 2**64)


def pack(documents: list[Tokens], context_size: int, first: int, eos: int) -> tuple[Tokens, Ints]:
    """Join token lists with `eos` and cut them into contexts that begin with `first`.

    Returns the contexts, int32 (contexts, context_size), the last one padded with `eos`, and the flat index of each
    document's first token, (documents,). Documents must not be empty.
    """
    if not documents:
        return np.empty((0, context_size), np.int32), np.empty(0, np.int64)
    body = context_size - 1
    lengths = np.array([len(d) + 1 for d in documents], np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)[:-1]])
    used = int(lengths.sum()) - 1  # the last document needs no EOS
    stream = np.full(-(-used // body) * body, eos, np.int32)
    for start, document in zip(starts.tolist(), documents, strict=True):
        stream[start : start + len(document)] = document
    tokens = np.empty((len(stream) // body, context_size), np.int32)
    tokens[:, 0] = first
    tokens[:, 1:] = stream.reshape(-1, body)
    return tokens, starts // body * context_size + 1 + starts % body


def _blocks_of(documents: Iterable[Document]) -> Iterator[list[Document]]:
    source = iter(documents)
    while block := list(itertools.islice(source, BLOCK_DOCUMENTS)):
        yield block


def _map_ahead(function: Callable[[T], R], items: Iterator[T]) -> Iterator[R]:
    """Yield `function` of each item, in order, computed ahead on threads.

    An error of `items` is raised after the results of the items before it. A caller that stops early never sees it.
    """
    pool = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="gsae-tokenise")
    waiting: deque[Future[R]] = deque()
    failed: Exception | None = None
    try:
        while not failed:
            try:
                waiting.append(pool.submit(function, next(items)))
            except StopIteration:
                break
            except Exception as error:
                failed = error
            if len(waiting) > AT_A_TIME:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failed:
        raise failed


def _make_block(
    documents: list[Document],
    *,
    encode: Encode,
    special: SpecialIds,
    count_rows: Callable[[Tokens], Ints],
    context_size: int,
    heldout: float,
    seed: int,
) -> Block:
    """Encode and pack a block of documents, each split by itself."""
    decides = [document.content if document.part_of is None else document.part_of for document in documents]
    splits = [HELDOUT if is_held_out(content, heldout, seed) else TRAIN for content in decides]
    used = [i for i, document in enumerate(documents) if not (document.again and splits[i] == HELDOUT)]
    encoded = dict(zip(used, encode([documents[i].content for i in used]), strict=True))
    tokens, starts, ids = [], [], []
    before = 0
    for split in (TRAIN, HELDOUT):
        mine = [i for i in used if len(encoded[i]) and splits[i] == split]
        packed, start = pack([encoded[i] for i in mine], context_size, special.first, special.eos_id)
        tokens.append(packed)
        starts.append(start + before)
        ids.append(np.array([documents[i].id for i in mine], np.int64))
        before += packed.size
    numbers = np.array([TRAIN, HELDOUT], np.uint8)
    return Block(
        tokens=np.concatenate(tokens),
        split=np.repeat(numbers, [len(each) for each in tokens]),
        start=np.concatenate(starts),
        id=np.concatenate(ids),
        document_split=np.repeat(numbers, [len(each) for each in ids]),
        read=len(documents),
        rows=(int(count_rows(tokens[TRAIN]).sum()), int(count_rows(tokens[HELDOUT]).sum())),
        again=any(document.again for document in documents),
        bad=tuple(document.bad for document in documents if document.bad and not document.again),
    )


def _count_rows(tokens: Tokens, special: SpecialIds, dropped_positions: tuple[int, ...]) -> Ints:
    """Return the number of rows of each context, (contexts,)."""
    counts: Ints = row_mask(tokens, special.excluded_ids, dropped_positions).sum(axis=1, dtype=np.int64)
    return counts


def _without_surplus(block: Block, count_rows: Callable[[Tokens], Ints], wanted: int) -> Block:
    """Drop train contexts from the end of a block while the others hold at least `wanted` rows."""
    counts = count_rows(block.tokens[block.split == TRAIN])
    kept = int(np.searchsorted(np.cumsum(counts), wanted)) + 1
    size = block.tokens.shape[1]
    cut, resume = kept * size, len(counts) * size
    stays = (block.start < cut) | (block.start >= resume)
    start = block.start[stays]
    contexts = np.r_[0:kept, len(counts) : len(block.tokens)]
    return replace(
        block,
        tokens=block.tokens[contexts],
        split=block.split[contexts],
        start=np.where(start >= resume, start - (resume - cut), start),
        id=block.id[stays],
        document_split=block.document_split[stays],
        rows=(int(counts[:kept].sum()), block.rows[HELDOUT]),
    )
