"""Tokenizers with more ids than the model's embedding has rows."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gsae.errors import UsageError
from gsae.harvest import HarvestConfig, harvest, make_request
from gsae.tests.support.command import gsae, refused

WORDS = "the expression is evaluated in order "


@pytest.fixture(scope="module")
def with_tool(tiny_llama: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with `<tool>` added to its tokenizer, and its embedding not resized."""
    place: Path = tmp_path_factory.mktemp("models") / "with-tool"
    shutil.copytree(tiny_llama, place)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    assert tokenizer.add_tokens(["<tool>"]) == 1
    tokenizer.save_pretrained(place)
    return place


def text(folder: Path, *documents: Any, field: str = "text") -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({field: document}) + "\n" for document in documents))
    return path


def asked(model: Path, dataset: Path, out: Path, *more: Any) -> list[Any]:
    known = ["harvest", "--model", model, "--dataset", dataset, "--site", "resid.1", "--context-size", 32]
    return [*known, "--heldout", "0.2", "--out", out, *more]


@pytest.mark.parametrize("more", [(), ("--only-tokens",), ("--dry-run", "--rows", 100)])
def test_the_first_document_with_an_unknown_token_is_named(
    with_tool: Path, tiny_tokenizer: Any, tmp_path: Path, more: tuple[Any, ...]
) -> None:
    known = len(tiny_tokenizer)
    dataset = text(tmp_path, *[WORDS * 3] * 7, f"{WORDS}<tool>{WORDS}", *[WORDS] * 5, "<tool>")
    said = f"Document 7 of the text has token '<tool>' with id {known}, and the model's embedding has {known} rows. "
    refused(2, said, *asked(with_tool, dataset, tmp_path / "store", *more))
    assert not (tmp_path / "store/plan.json").exists()


def test_token_ids_are_checked_too(with_tool: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    known = len(tiny_tokenizer)
    dataset = text(tmp_path, [4, 5, 6], [7, known, 8], field="ids")
    refused(
        2, f"Document 1 of the text has token '<tool>' with id {known}", *asked(with_tool, dataset, tmp_path / "s"),
        "--token-field", "ids",
    )  # fmt: skip


def test_a_tokenizer_with_more_ids_harvests_a_text_without_them(with_tool: Path, tmp_path: Path) -> None:
    dataset = text(tmp_path, *[f"{i} {WORDS * 3}" for i in range(40)])
    done = gsae(*asked(with_tool, dataset, tmp_path / "store"))
    assert done.returncode == 0, done.stderr


def test_a_document_that_is_not_needed_is_not_refused(with_tool: Path, tmp_path: Path) -> None:
    dataset = text(tmp_path, *[f"{i} {WORDS * 3}" for i in range(40)], "<tool>")
    out = tmp_path / "store"
    store = harvest(
        HarvestConfig(
            model=str(with_tool), dataset=str(dataset), sites=("resid.1",), rows=100, context_size=32, heldout=0.0
        ),
        out,
    )
    assert store is not None
    assert store.plan.rows == 100


def test_special_tokens_that_the_model_does_not_know_are_refused_at_once(with_tool: Path, tmp_path: Path) -> None:
    shutil.copytree(with_tool, tmp_path / "model")
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<tool>"}))
    config = HarvestConfig(model=str(tmp_path / "model"), dataset="builtin:pydoc", sites=("resid.1",))
    with pytest.raises(UsageError, match=r"special token '<tool>' with id \d+, and the model's embedding has"):
        make_request(config)
