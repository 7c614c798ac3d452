"""Which documents are taken, in which order and how often, and texts that are token ids already."""

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gsae.errors import GsaeError, IncompatibleError, UsageError
from gsae.harvest import (
    Document,
    HarvestConfig,
    LanguageModel,
    documents,
    harvest,
    harvest_tokens,
    load_lm,
    special_ids,
    tokenise,
)
from gsae.harvest.model.model_files import ModelFiles
from gsae.harvest.text.packing import is_held_out
from gsae.store import read_tokens, verify
from gsae.store.format import row_order as order
from gsae.store.read import contexts_reader as contexts
from gsae.tests.support.texts import contexts_of, joined

pytestmark = pytest.mark.slow

TEXTS = [f"document {i} of many" for i in range(50)]


def written(folder: Path, values: list[Any], field: str = "text", name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps({"n": i, field: value}) for i, value in enumerate(values)))
    return str(path)


@pytest.fixture
def cached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets` cache shuffled files in a folder of this test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


class Stream:
    """The part of a stream of `datasets` that is used."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def iter(self, batch_size: int) -> Any:
        for at in range(0, len(self.values), batch_size):
            yield {"text": self.values[at : at + batch_size]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A Hub with one text; tests may change its commit."""
    at = {"commit": "0" * 40}
    monkeypatch.setattr("gsae.harvest.text.hub_datasets.pin", lambda kind, name, revision: revision or at["commit"])
    monkeypatch.setattr(
        "gsae.harvest.text.hub_datasets.load_rows", lambda *_, **__: Stream([str(i) for i in range(40_000)])
    )
    return at


def test_a_local_file_is_shuffled_as_a_whole_by_the_stores_permutation(cached: None, tmp_path: Path) -> None:
    path = written(tmp_path, TEXTS)
    text = documents(path, shuffle_seed=5)
    words = np.random.Philox(key=[5, 10], counter=[0, 0, 0, 0]).random_raw(len(TEXTS))
    places = np.argsort(words, kind="stable").tolist()
    assert list(text.read()) == list(text.read()) == [Document(place, TEXTS[place]) for place in places]
    assert (text.source.shuffle_seed, text.source.shuffle_within) == (5, None)
    assert [d.id for d in documents(path, shuffle_seed=6).read()] != places


def test_the_builtin_is_shuffled_as_a_whole() -> None:
    plain = list(documents("builtin:pydoc").read())
    mixed = list(documents("builtin:pydoc", shuffle_seed=0).read())
    assert mixed != plain
    assert sorted(mixed) == sorted(plain)


def test_a_hub_text_is_shuffled_in_blocks_and_documents_keep_their_numbers(hub: dict[str, str]) -> None:
    text = documents("owner/name", shuffle_seed=0)
    assert (text.source.shuffle_seed, text.source.shuffle_within) == (0, 1 << 14)
    found = list(text.read())
    assert all(document.content == str(document.id) for document in found)
    places = np.array([document.id for document in found])
    for first in range(0, 40_000, 1 << 14):
        block = places[first : first + (1 << 14)]
        assert sorted(block) == list(range(first, min(first + (1 << 14), 40_000)))
        assert not (np.diff(block) == 1).all()


@pytest.mark.parametrize("seed", [None, 3])
def test_a_part_and_its_continuation_make_the_whole_text_in_any_order(
    cached: None, tmp_path: Path, seed: int | None
) -> None:
    path = written(tmp_path, TEXTS)
    whole = list(documents(path, shuffle_seed=seed).read())
    parts = [{"maximum": 20}, {"skip": 20, "maximum": 7}, {"skip": 27}]
    assert whole == [d for part in parts for d in documents(path, shuffle_seed=seed, **part).read()]


def test_a_repeated_text_begins_again_with_the_same_documents(tmp_path: Path) -> None:
    text = documents(written(tmp_path, TEXTS), skip=2, maximum=3, repeat=True)
    found = list(islice(text.read(), 8))
    assert [document.id for document in found] == [2, 3, 4, 2, 3, 4, 2, 3]
    assert [document.again for document in found] == [False] * 3 + [True] * 5
    assert list(documents(written(tmp_path, TEXTS), skip=100, repeat=True).read()) == []


def test_settings_of_the_documents_are_omitted_from_the_plan_when_default() -> None:
    def recorded(**settings: Any) -> set[str]:
        return set(documents("builtin:pydoc", **settings).source.model_dump(mode="json"))

    plain = recorded()
    assert plain == {"id", "revision", "split", "text_field", "sha256"}
    assert recorded(shuffle_seed=0, repeat=True) - plain == {"shuffle_seed", "repeat"}
    assert recorded(skip=1, maximum=2) - plain == {"skip_documents", "max_documents"}


# --- token ids ---


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    ids = [[5, 6, 7], [], [8], [4, 1023]]
    text = documents(written(tmp_path, ids, "input_ids"), field="input_ids", tokenised=True)
    assert [document.content.tolist() for document in text.read()] == ids  # type: ignore[union-attr]
    assert text.source.model_dump()["tokenised"] is True
    assert text.source.text_field == "input_ids"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("text", "row 1: field 'ids' holds a value of type str; a list of token ids is needed"),
        ([1.5], "holds a value of type list; a list of token ids"),
        ([[1]], "holds a value of type list"),
        ([-1], "holds a value of type list"),
        ([1 << 31], "holds a value of type list"),
        (None, "holds nothing; a list of token ids is needed"),
    ],
)
def test_a_row_without_a_list_of_ids_is_bad_and_named_with_its_number(value: Any, said: str) -> None:
    def values() -> Any:
        yield {"ids": [[5, 6]]}
        yield {"ids": [value]}

    class Table:
        def iter(self, batch_size: int) -> Any:
            return values()

    from gsae.harvest.text.dataset_rows import read_rows

    good, bad = read_rows("a.jsonl", "ids", True, Table())
    assert good.bad is None
    assert re.search(said, str(bad.bad))


def test_text_in_token_field_and_ids_in_text_field_name_the_right_option(tmp_path: Path) -> None:
    path = written(tmp_path, [[1, 2]], "ids")
    with pytest.raises(
        UsageError, match=r"holds a value of type list; text is needed \(for token ids: --token-field\)"
    ):
        list(documents(path, field="ids").read())
    with pytest.raises(UsageError, match=r"no field 'input_ids'\. It has: ids, n\."):
        list(documents(path, field="input_ids", tokenised=True).read())
    with pytest.raises(UsageError, match="Leave out --token-field"):
        documents("builtin:pydoc", tokenised=True)


def test_ids_beyond_the_vocabulary_are_refused(tiny_tokenizer: Any) -> None:
    ids = np.array([5, len(tiny_tokenizer)], np.int32)
    with pytest.raises(
        UsageError, match=f"has token id 1024; the model's tokenizer has ids 0 to {len(tiny_tokenizer) - 1}"
    ):
        contexts_of([ids], tiny_tokenizer, context_size=8)


def test_special_ids_in_a_text_of_ids_stay_in_the_contexts_and_give_no_rows(tiny_tokenizer: Any) -> None:
    ids = np.array([1, 7, 2, 8, 3, 3], np.int32)
    (block,) = tokenise([Document(0, ids)], tiny_tokenizer, context_size=8, rows=None, heldout=0.0, seed=0)
    assert block.tokens.tolist() == [[1, 1, 7, 2, 8, 3, 3, 2]]
    assert block.rows == (2, 0)


def test_ids_and_their_text_give_the_same_contexts_apart_from_the_split(tiny_tokenizer: Any) -> None:
    ids = [np.array(tiny_tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in TEXTS]
    one, two = (contexts_of(each, tiny_tokenizer, context_size=16) for each in (TEXTS, ids))
    assert np.array_equal(one.tokens, two.tokens)
    assert is_held_out(ids[3], 0.5, 1) == is_held_out(ids[3].copy(), 0.5, 1)
    assert {is_held_out(each, 0.5, 1) for each in ids} == {True, False}


# --- all of it, to the store ---


def config(model: Path, dataset: str, **changed: Any) -> HarvestConfig:
    settings = {"model": str(model), "dataset": dataset, "sites": ("mlp.0",), "context_size": 16, "window_rows": 256}
    return HarvestConfig(**(settings | {"threads": 1, "heldout": 0.3} | changed))


def test_a_repeated_text_fills_the_budget_and_holds_out_each_document_once(tiny_llama: Path, tmp_path: Path) -> None:
    path = written(tmp_path, TEXTS)
    once = harvest(config(tiny_llama, path), tmp_path / "once")
    assert once is not None
    wanted = once.plan.rows * 3 + 1
    store = harvest(config(tiny_llama, path, rows=wanted, repeat=True), tmp_path / "store")
    assert store is not None
    assert store.plan.rows == wanted
    assert not store.plan.contexts.ended_early
    assert store.plan.heldout_rows == once.plan.heldout_rows
    assert verify(store, deep=True) == []
    found = store.documents()
    held, train = (found["id"][found["split"] == split] for split in (1, 0))
    assert len(set(held.tolist())) == len(held)
    assert {int((train == place).sum()) for place in set(train.tolist())} <= {3, 4}
    with pytest.raises(UsageError, match="repeat: needs rows, the number at which reading ends"):
        config(tiny_llama, path, repeat=True)


def test_shuffled_tokenised_documents_are_harvested(cached: None, tiny_llama: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 1024, int(n)).tolist() for n in rng.integers(0, 30, 40)]
    path = written(tmp_path, ids, "input_ids")
    store = harvest(config(tiny_llama, path, token_field="input_ids", shuffle_documents=1), tmp_path / "store")
    assert store is not None
    assert verify(store, deep=True) == []
    flat = store.tokens().ravel()
    found = store.documents()
    assert found["id"].tolist() != sorted(found["id"])
    assert set(found["id"]) == {place for place, each in enumerate(ids) if each}
    assert all(flat[start] == ids[place][0] for start, place in zip(found["start"], found["id"], strict=True))


def test_a_dataset_that_changed_on_the_hub_is_named_until_its_tokens_are_finished(
    hub: dict[str, str], tiny_llama: Path, tmp_path: Path
) -> None:
    asked = config(tiny_llama, "owner/name", max_documents=3000)
    harvest_tokens(asked, tmp_path)
    made = (tmp_path / "tokens/made.json").read_bytes()
    (tmp_path / "tokens/made.json").unlink()
    before, hub["commit"] = hub["commit"], "1" * 40
    with pytest.raises(IncompatibleError, match=f"dataset.revision was '{before}', now '{hub['commit']}'"):
        harvest(asked, tmp_path)
    (tmp_path / "tokens/made.json").write_bytes(made)
    with pytest.raises(IncompatibleError, match=f"dataset.revision was '{before}', now '{hub['commit']}'"):
        harvest(asked.model_copy(update={"dataset_revision": hub["commit"]}), tmp_path)
    store = harvest(asked, tmp_path)
    assert store is not None
    assert store.plan.dataset.revision == before
    assert harvest(asked.model_copy(update={"dataset_revision": before}), tmp_path) is not None


def test_a_model_that_changed_on_the_hub_is_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tiny_llama, written(tmp_path, TEXTS))
    old, new = (ModelFiles(tiny_llama.name, digit * 40, tiny_llama) for digit in "01")

    def load(config: HarvestConfig) -> LanguageModel:
        lm = load_lm(config.model)
        return replace(lm, provenance=replace(lm.provenance, revision=old.revision))

    monkeypatch.setattr("gsae.harvest.request.find_model", lambda *_, **__: old)
    assert harvest(asked, tmp_path / "store", load=load) is not None
    monkeypatch.setattr("gsae.harvest.request.find_model", lambda *_, **__: new)
    with pytest.raises(IncompatibleError, match=f"model.revision was '{old.revision}', now '{new.revision}'"):
        harvest(asked, tmp_path / "store", load=load)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    context_size=st.integers(2, 20),
    share=st.sampled_from([0.0, 0.3, 0.6]),
    wanted=st.integers(1, 400) | st.none(),
    block=st.integers(1, 9),
    at_a_time=st.integers(1, 4),
    repeat=st.booleans(),
)
def test_packing_equals_a_packing_token_by_token(
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    context_size: int,
    share: float,
    wanted: int | None,
    block: int,
    at_a_time: int,
    repeat: bool,
) -> None:
    """Against a packing written here token by token, over blocks, splits, budgets, repeats and threads."""
    monkeypatch.setattr("gsae.harvest.text.packing.BLOCK_DOCUMENTS", block)
    monkeypatch.setattr("gsae.harvest.text.packing.AT_A_TIME", at_a_time)
    ids = iter(range(4, 10**6))
    source = [np.array([4 + next(ids) % 1000 for _ in range(n)], np.int32) for n in lengths]
    read = [Document(place, each) for place, each in enumerate(source)]
    if repeat:
        read += [document._replace(again=True) for document in read]
    special = special_ids(tiny_tokenizer)
    expected: list[tuple[int, list[int]]] = []
    rows = 0
    for first in range(0, len(read), block):
        if wanted is not None and rows >= wanted:
            break
        sides: dict[int, list[int]] = {0: [], 1: []}
        for document in read[first : first + block]:
            content, again = document.content, document.again
            side = int(is_held_out(content, share, 7))
            if len(content) and not (again and side):
                sides[side] += [special.eos_id] * bool(sides[side]) + content.tolist()
        for side, stream in sides.items():
            for at in range(0, len(stream), context_size - 1):
                if side == 0 and wanted is not None and rows >= wanted:
                    break
                body = stream[at : at + context_size - 1]
                padded = body + [special.eos_id] * (context_size - 1 - len(body))
                expected.append((side, [special.first, *padded]))
                rows += 0 if side else sum(token not in special.excluded_ids for token in body)
    settings = {"context_size": context_size, "rows": wanted, "heldout": share, "seed": 7}
    blocks = list(tokenise(read, tiny_tokenizer, **settings))
    made = joined(blocks, context_size)
    assert [(int(side), row.tolist()) for side, row in zip(made.split, made.tokens, strict=True)] == expected
    assert sum(each.rows[0] for each in blocks) == rows
    counted = order.row_mask(made.tokens, special.excluded_ids, ()).sum(axis=1)
    assert [sum(each.rows[side] for each in blocks) for side in (0, 1)] == [
        int(counted[made.split == side].sum()) for side in (0, 1)
    ]


def test_a_missing_text_field_is_refused_and_another_field_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    path = written(tmp_path, TEXTS, "body")
    with pytest.raises(UsageError, match=r"row 0: no field 'text'\. It has: body, n\."):
        harvest(config(tiny_llama, path), tmp_path / "store")
    store = harvest(config(tiny_llama, path, text_field="body"), tmp_path / "store")
    assert store is not None


@pytest.mark.parametrize("failing", [1025, 3000])
def test_a_row_without_text_loses_no_part_that_was_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    monkeypatch.setattr("gsae.harvest.token_files.PART_TOKENS", 4000)
    texts: list[Any] = [f"document {i}" for i in range(3500)]
    bad = written(tmp_path, [*texts[:failing], None, *texts[failing:]])
    with pytest.raises(GsaeError, match=f"row {failing}: field 'text' holds nothing"):
        harvest_tokens(config(tiny_llama, bad), tmp_path / "store")
    assert len(list((tmp_path / "store").glob("tokens/*.npz"))) == (failing > 2048)
    harvest_tokens(config(tiny_llama, bad, rows=10), tmp_path / "enough")  # comes to an end before that row


def test_long_and_empty_documents_are_packed(tiny_llama: Path, tmp_path: Path) -> None:
    texts = ["", "long " * 2000, "  ", "", "short"]
    harvest_tokens(config(tiny_llama, written(tmp_path, texts), heldout=0.0), tmp_path / "store")
    made = read_tokens(tmp_path / "store")[1]
    assert made is not None
    tokens, split = contexts.read_contexts(tmp_path / "store", made.contexts)
    assert made.contexts.documents == 3  # spaces are text, nothing is not
    assert len(tokens) > 100
    assert not split.any()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text":\n', "'a.jsonl', row 1: not JSON"),
        ("a.jsonl", b"", "'a.jsonl' is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "row 1: field 'text' holds nothing"),
        ("a.txt", b"\xff\xfe\xfa", "'a.txt' is not UTF-8"),
    ],
)
def test_shuffled_files_without_text_are_refused_in_one_line(
    cached: None, tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=said) as caught:
        list(documents(str(tmp_path / name), shuffle_seed=0).read())
    assert "\n" not in str(caught.value)
