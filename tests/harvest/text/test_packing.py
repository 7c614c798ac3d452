"""Contexts: every token once and in order, splits that share no document, blocks that do not depend on others."""

import hashlib
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gsae.errors import UsageError
from gsae.harvest import Document, documents, special_ids, tokenise
from gsae.harvest.text.packing import is_held_out, pack
from gsae.store.format import row_order as order
from gsae.tests.support.texts import Contexts, contexts_of, numbered

pytestmark = pytest.mark.slow

TEXTS = st.lists(st.text("ab <|>é\n", max_size=30), max_size=12)
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Encode with the Rust tokenizer itself, special strings taken as characters."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    return list(backend.encode(text, add_special_tokens=False).ids)


def document_tokens(contexts: Contexts, index: int, length: int, context_size: int) -> list[int]:
    """Read `length` tokens of document `index`, skipping the first token of each context."""
    flat, at = [], int(contexts.document_start[index])
    while len(flat) < length:
        if at % context_size:
            flat.append(int(contexts.tokens.flat[at]))
        at += 1
    return flat


@quick
@given(
    lengths=st.lists(st.integers(1, 20), max_size=8),
    context_size=st.integers(2, 9),
)
def test_packing_lays_every_token_once_and_in_order(lengths: list[int], context_size: int) -> None:
    ids = iter(range(10, 1000))
    texts = [np.array([next(ids) for _ in range(n)], np.int32) for n in lengths]
    tokens, starts = pack(texts, context_size, first=1, eos=2)
    assert (tokens[:, :1] == 1).all()
    stream = tokens[:, 1:].ravel().tolist()
    joined = [token for text in texts for token in [*text.tolist(), 2]][:-1]
    assert stream[: len(joined)] == joined
    assert set(stream[len(joined) :]) <= {2}
    assert len(stream) - len(joined) < context_size - 1
    assert tokens.flat[starts].tolist() == [int(text[0]) for text in texts]


@quick
@given(texts=TEXTS, context_size=st.integers(2, 16), seed=st.integers(0, 2**63 - 1))
def test_every_document_is_complete_and_in_one_split(
    tiny_tokenizer: Any, texts: list[str], context_size: int, seed: int
) -> None:
    encoded = [plain_ids(tiny_tokenizer, text) for text in texts]
    if not any(ids and not is_held_out(t, 0.3, seed) for t, ids in zip(texts, encoded, strict=True)):
        return
    made = contexts_of(texts, tiny_tokenizer, context_size=context_size, heldout=0.3, seed=seed)
    assert sorted(made.document_id.tolist()) == [i for i, ids in enumerate(encoded) if ids]
    assert (np.diff(made.document_start) > 0).all()
    for index, name in enumerate(made.document_id.tolist()):
        ids = encoded[name]
        assert document_tokens(made, index, len(ids), context_size) == ids
        contexts = np.array([made.document_start[index] // context_size])
        assert made.split[contexts] == made.document_split[index] == is_held_out(texts[name], 0.3, seed)
    rows = order.row_mask(made.tokens, special_ids(tiny_tokenizer).excluded_ids, ())
    assert int(rows.sum()) == sum(map(len, encoded))
    assert made.read == len(texts)


def test_a_block_does_not_depend_on_other_blocks(tiny_tokenizer: Any) -> None:
    def made(texts: Sequence[str]) -> Contexts:
        return contexts_of(texts, tiny_tokenizer, context_size=16, heldout=0.3, seed=1)

    first, second = [f"document {i}" for i in range(1024)], [f"another {i}" for i in range(700)]
    one, two, both = made(first), made(second), made([*first, *second])
    assert np.array_equal(both.tokens, np.concatenate([one.tokens, two.tokens]))
    assert np.array_equal(both.split, np.concatenate([one.split, two.split]))
    shifted = two.document_start + one.tokens.size
    assert np.array_equal(both.document_start, np.concatenate([one.document_start, shifted]))
    assert np.array_equal(both.document_id, np.concatenate([one.document_id, two.document_id + 1024]))


def test_equal_texts_fall_on_one_side_and_the_share_is_met() -> None:
    texts = [f"text {i}" for i in range(4000)]
    held = [is_held_out(text, 0.25, 7) for text in texts]
    assert 0.22 < np.mean(held) < 0.28
    assert held == [is_held_out(text, 0.25, 7) for text in texts]
    assert held != [is_held_out(text, 0.25, 8) for text in texts]
    assert not any(is_held_out(text, 0.0, 7) for text in texts)


def test_a_document_is_held_out_by_the_philox_word_of_its_hash() -> None:
    index = int.from_bytes(hashlib.sha256(b"some text").digest()[:8], "big")
    key, counter = np.array([5, 1], np.uint64), np.array([0, 0, index, 0], np.uint64)
    share = int(np.random.Philox(key=key, counter=counter).random_raw()) / 2**64
    assert not is_held_out("some text", share - 1e-9, 5)
    assert is_held_out("some text", share + 1e-9, 5)


@quick
@given(wanted=st.integers(1, 900), dropped=st.sampled_from([(), (1,), (1, 3)]))
def test_tokenising_keeps_only_the_train_contexts_that_the_budget_needs(
    tiny_tokenizer: Any, wanted: int, dropped: tuple[int, ...]
) -> None:
    texts = [f"{i} " + "ab" * (i % 7) for i in range(100)]
    settings = {"context_size": 16, "heldout": 0.3, "seed": 3, "dropped_positions": dropped}
    whole = contexts_of(texts, tiny_tokenizer, **settings)
    made = contexts_of(texts, tiny_tokenizer, rows=wanted, **settings)
    counts = order.row_mask(made.tokens, special_ids(tiny_tokenizer).excluded_ids, dropped).sum(axis=1)
    train = counts[made.split == 0]
    if train.sum() < wanted:
        assert np.array_equal(made.tokens, whole.tokens)
        return
    assert train.sum() >= wanted > train[:-1].sum()
    assert np.array_equal(made.tokens[made.split == 0], whole.tokens[whole.split == 0][: len(train)])
    assert np.array_equal(made.tokens[made.split == 1], whole.tokens[whole.split == 1])
    firsts = {name: whole.tokens.flat[at] for name, at in zip(whole.document_id, whole.document_start, strict=True)}
    assert [firsts[name] for name in made.document_id] == made.tokens.flat[made.document_start].tolist()
    assert (made.split[made.document_start // 16] == made.document_split).all()
    cut = len(train) * 16
    gone = {
        n
        for n, at in zip(whole.document_id, whole.document_start, strict=True)
        if cut <= at < (whole.split == 0).sum() * 16
    }
    assert set(made.document_id) == set(whole.document_id) - gone


def test_tokenising_stops_at_the_block_that_fills_the_budget(tiny_tokenizer: Any) -> None:
    source = iter(numbered(f"document {i}" for i in range(100_000)))
    blocks = list(tokenise(source, tiny_tokenizer, context_size=16, rows=100, heldout=0.1, seed=0))
    assert [block.read for block in blocks] == [1024]
    assert 1024 <= next(source).id <= 4 * 1024  # some blocks are read ahead


def test_special_strings_in_a_text_are_ordinary_text(tiny_tokenizer: Any) -> None:
    text = "a <|im_start|>user<|im_end|> b <|endoftext|>"
    assert tiny_tokenizer.bos_token_id in tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    made = contexts_of([text], tiny_tokenizer, context_size=256)
    special = special_ids(tiny_tokenizer)
    body = made.tokens[0, 1:]
    length = int((~np.isin(body, special.excluded_ids)).sum())
    assert set(body[length:].tolist()) == {special.eos_id}
    assert tiny_tokenizer.decode(body[:length].tolist()) == text


def test_all_special_tokens_are_excluded_and_only_those(tiny_tokenizer: Any) -> None:
    special = special_ids(tiny_tokenizer)
    assert special.excluded_ids == (0, 1, 2, 3)
    assert (special.first, special.bos_id, special.eos_id) == (1, 1, 2)


def test_a_context_begins_with_eos_if_the_tokenizer_has_no_bos(tiny_llama: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, bos_token=None)
    made = contexts_of(["some text"], tokenizer, context_size=8)
    assert special_ids(tokenizer).bos_id is None
    assert set(made.tokens[:, 0].tolist()) == {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        special_ids(tokenizer)


def test_all_parts_of_a_topic_fall_on_one_side_whatever_the_blocks(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae.harvest.text.packing.BLOCK_DOCUMENTS", 7)
    parts = list(documents("builtin:pydoc", shuffle_seed=3).read())
    assert len({part.id for part in parts}) < len(parts)
    made = contexts_of(parts, tiny_tokenizer, context_size=64, heldout=0.3, seed=2)
    sides = {side: set(made.document_id[made.document_split == side].tolist()) for side in (0, 1)}
    assert not sides[0] & sides[1]
    assert sides[1] == {part.id for part in parts if is_held_out(part.part_of or "", 0.3, 2)}
    assert len(sides[1]) < int((made.document_split == 1).sum())  # a topic that was cut is among them
    # By their own contents the parts would fall on both sides.
    by_content = [{part.id for part in parts if is_held_out(part.content, 0.3, 2) == side} for side in (False, True)]
    assert by_content[0] & by_content[1]


def leak(tokenizer: Any, read: Sequence[Document], length: int = 20) -> float:
    """Share of the held-out sequences of 20 tokens that are also in train, over eight splits."""
    windows = []
    for text in (str(document.content) for document in read):
        ids = plain_ids(tokenizer, text)
        windows.append([tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)])
    shared = total = 0
    for seed in range(8):
        held = [is_held_out(document.part_of or document.content, 0.1, seed) for document in read]
        train = {w for ws, h in zip(windows, held, strict=True) if not h for w in ws}
        mine = [w for ws, h in zip(windows, held, strict=True) if h for w in ws]
        shared, total = shared + sum(w in train for w in mine), total + len(mine)
    return shared / total


def test_held_out_text_of_pydoc_is_not_in_train(tiny_tokenizer: Any) -> None:
    assert leak(tiny_tokenizer, list(documents("builtin:pydoc").read())) < 0.01
    # Without the rule against repeated paragraphs it would.
    assert leak(tiny_tokenizer, numbered(topics[name] for name in sorted(topics))) > 0.1
