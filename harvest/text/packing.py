"""Documents to contexts: which are held out, how they are packed, where tokenising stops.

Text is taken in blocks of 1024 documents and each split of a block is packed by itself, so a block's contexts depend on
nothing else: blocks are made side by side, and begun anywhere, to the same bytes. The price is one padded context per
block and split, and documents that share a context attend to one another across an EOS.

The tokenizer's own threads (rayon) take all cores for the documents of a block, without Python's lock; two blocks at a
time, so that one is read, hashed and packed while another is encoded. Processes of our own would add copies of the text
and of the tokenizer for little: all that is done outside the tokenizer is a few hundredths of the work.
`RAYON_NUM_THREADS` limits the cores. Beside a few blocks of text, some 100 bytes are held for each token of 2^22
characters, or of the longest document.
"""

import copy
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

from gsae.errors import UsageError
from gsae.store import Stream, row_mask, word

from .sources import Content, Document

BLOCK_DOCUMENTS = 1024
ENCODED_CHARACTERS = 1 << 22
AT_A_TIME = 2
TRAIN, HELDOUT = 0, 1

Ints = NDArray[np.int64]
Tokens = NDArray[np.int32]
Encode = Callable[[list[Content]], list[Tokens]]
T = TypeVar("T")
R = TypeVar("R")


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
class Block:
    """The contexts of a block of documents as the language model sees them, train before held out.

    tokens: int32 (contexts, context_size). split: uint8 (contexts,), 0 train, 1 held out. start: int64 (documents,)
    flat index into `tokens` of each document's first token, ascending; id: int64 (documents,) its place in the source;
    document_split: uint8 (documents,). read: documents taken from the source, empty ones included. rows: of train and
    of the held-out contexts. again: documents were read that had been read before.
    """

    tokens: Tokens
    split: NDArray[np.uint8]
    start: Ints
    id: Ints
    document_split: NDArray[np.uint8]
    read: int
    rows: tuple[int, int]
    again: bool


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
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    context_size: int,
    rows: int | None,
    heldout: float,
    seed: int,
    dropped_positions: tuple[int, ...] = (),
) -> Iterator[Block]:
    """Turn `documents` into blocks of contexts, in order, until these hold `rows` train rows (None: all the text).

    heldout: share of the documents that are held out; of what is read again these are left out, as rows to evaluate on
    are worth nothing twice. Raises UsageError for token ids that the tokenizer does not have.
    """
    special = special_ids(tokenizer)
    rule = partial(_rows, special=special, dropped_positions=dropped_positions)
    make = partial(
        _block, encode=_encoder(tokenizer), special=special, rule=rule, size=context_size, heldout=heldout, seed=seed
    )
    found = 0
    for block in _side_by_side(make, _blocks_of(documents)):
        enough = rows is not None and found + block.rows[0] >= rows
        yield _without_surplus(block, rule, rows - found) if rows is not None and enough else block
        found += block.rows[0]
        if enough:
            return


def is_held_out(content: Content, heldout: float, seed: int) -> bool:
    """Say whether a document is held out; equal ones always fall on the same side."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content.astype("<i4").tobytes()
    index = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    return word(seed, Stream.HELDOUT, index) < int(heldout * 2**64)


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


def _blocks_of(documents: Iterable[Document]) -> Iterator[list[Document]]:
    source = iter(documents)
    while block := list(itertools.islice(source, BLOCK_DOCUMENTS)):
        yield block


def _side_by_side(function: Callable[[T], R], items: Iterator[T]) -> Iterator[R]:
    """Yield `function` of each item, in order, made ahead on threads; an error of `items` comes after what was before.

    So whoever leaves early never learns of an error further on.
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


def _encoder(tokenizer: Any) -> Encode:
    """Return what gives the token ids of documents, (tokens,) each.

    What encodes is a copy of the tokenizer's own JSON, whose sum is in the plan, and nothing around it. The strings of
    special tokens are ordinary text: '<|im_start|>' in a document is.
    """
    backend, vocabulary = copy.deepcopy(tokenizer.backend_tokenizer), len(tokenizer)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: list[str]) -> Iterator[Tokens]:
        for few in _by_characters(texts):
            for encoding in backend.encode_batch_fast(few, add_special_tokens=False):
                yield np.asarray(encoding.ids, np.int32)

    def ids_of(contents: list[Content]) -> list[Tokens]:
        texts = encode([content for content in contents if isinstance(content, str)])
        return [next(texts) if isinstance(content, str) else _checked(content, vocabulary) for content in contents]

    return ids_of


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


def _block(
    documents: list[Document],
    *,
    encode: Encode,
    special: SpecialIds,
    rule: Callable[[Tokens], Ints],
    size: int,
    heldout: float,
    seed: int,
) -> Block:
    sides = [HELDOUT if is_held_out(document.content, heldout, seed) else TRAIN for document in documents]
    wanted = [i for i, document in enumerate(documents) if not (document.again and sides[i] == HELDOUT)]
    ids = dict(zip(wanted, encode([documents[i].content for i in wanted]), strict=True))
    tokens, starts, places = [], [], []
    before = 0
    for split in (TRAIN, HELDOUT):
        mine = [i for i in wanted if len(ids[i]) and sides[i] == split]
        packed, start = pack([ids[i] for i in mine], size, special.first, special.eos_id)
        tokens.append(packed)
        starts.append(start + before)
        places.append(np.array([documents[i].place for i in mine], np.int64))
        before += packed.size
    numbers = np.array([TRAIN, HELDOUT], np.uint8)
    return Block(
        tokens=np.concatenate(tokens),
        split=np.repeat(numbers, [len(each) for each in tokens]),
        start=np.concatenate(starts),
        id=np.concatenate(places),
        document_split=np.repeat(numbers, [len(each) for each in places]),
        read=len(documents),
        rows=(int(rule(tokens[TRAIN]).sum()), int(rule(tokens[HELDOUT]).sum())),
        again=any(document.again for document in documents),
    )


def _rows(tokens: Tokens, special: SpecialIds, dropped_positions: tuple[int, ...]) -> Ints:
    """Return the number of rows of each context, (contexts,)."""
    counts: Ints = row_mask(tokens, special.excluded_ids, dropped_positions).sum(axis=1, dtype=np.int64)
    return counts


def _without_surplus(block: Block, rule: Callable[[Tokens], Ints], wanted: int) -> Block:
    """Drop train contexts from the end of a block while the others hold at least `wanted` rows."""
    counts = rule(block.tokens[block.split == TRAIN])
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
