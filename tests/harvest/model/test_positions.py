"""How long contexts may be: what is refused is what the model cannot run, and what is warned of runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.errors import UsageError
from gsae.harvest import HarvestConfig, Noted, harvest, harvest_tokens, make_request
from gsae.harvest.model.positions import Positions, positions_of
from gsae.tests.support.causal_lms import tiny_model
from gsae.tests.support.command import gsae, refused
from gsae.tests.support.families import built
from gsae.tests.support.selection import mostly_slow

TABLES = {
    "gpt2": 64,
    "gpt_neo": 64,
    "gpt_bigcode": 64,
    "openai-gpt": 64,
    "opt": 64,
    "biogpt": 64,
    "bart": 64,
    "gptj": 64,
}
TABLES |= {"codegen": 64, "ctrl": 64, "mpt": 2048, "roberta": 63, "bert": 64, "xlm": 64, "roformer": 64}
WITHOUT = ("llama", "gpt_neox", "qwen3", "gemma2", "phi", "bloom", "falcon", "mamba", "stablelm")


def runs(model: Any, tokens: int) -> bool:
    """Whether a model reads that many tokens."""
    ids = torch.randint(3, 60, (1, tokens), generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", mostly_slow(TABLES, "gpt2", "opt", "roberta"))
def test_a_table_is_the_number_of_tokens_that_the_model_reads(family: str) -> None:
    model = tiny_model(family)
    found = positions_of(model)
    assert found.table == TABLES[family]
    assert runs(model, found.table)
    assert not runs(model, found.table + 1)


@pytest.mark.parametrize("family", WITHOUT)
def test_models_that_compute_positions_have_no_table(family: str) -> None:
    model = tiny_model(family)
    found = positions_of(model)
    assert found.table is None
    assert runs(model, 200)


def test_the_table_is_found_without_weights() -> None:
    assert positions_of(built("OPT", device="meta", max_position_embeddings=96)) == Positions(96, 96)
    assert positions_of(built("GPTJ", device="meta", n_positions=96)) == Positions(96, 96)
    assert positions_of(built("Llama", device="meta", max_position_embeddings=96)) == Positions(96, None)


def test_a_context_within_the_trained_length_is_not_warned_of() -> None:
    assert Positions(64, None).check(64) is None
    assert Positions(None, None).check(1 << 20) is None
    assert "65 is longer than the 64 tokens" in str(Positions(64, None).check(65))


@pytest.fixture(scope="module")
def saved(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Saves a tiny model of a family with 64 positions, and the tokenizer."""

    def save(family: str) -> Path:
        place: Path = tmp_path_factory.mktemp("models") / family
        known = {"bos_token_id": tiny_tokenizer.bos_token_id, "eos_token_id": tiny_tokenizer.eos_token_id}
        built(family, vocab_size=len(tiny_tokenizer), max_position_embeddings=64, **known).save_pretrained(place)
        tiny_tokenizer.save_pretrained(place)
        return place

    return save


def asked(model: Path, context_size: int) -> HarvestConfig:
    return HarvestConfig(
        model=str(model), dataset="builtin:pydoc", sites=("resid.1",), rows=500, context_size=context_size,
        window_rows=512, heldout=0.01,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["GPT2", "OPT", "GPTJ"])
def test_a_context_beyond_the_table_is_refused_at_once(saved: Any, tmp_path: Path, family: str) -> None:
    model = saved(family)
    with pytest.raises(UsageError, match=r"context_size 65 is more than the 64 positions .* Use --context-size 64 or"):
        make_request(asked(model, 65))
    assert harvest(asked(model, 64), tmp_path / "store") is not None


def test_a_rotary_model_beyond_its_trained_length_is_harvested_with_one_warning(saved: Any, tmp_path: Path) -> None:
    model = saved("Llama")
    said = "--context-size 65 is longer than the 64 tokens that the model's config gives"
    for run in (harvest_tokens, harvest):
        events: list[Any] = []
        run(asked(model, 65), tmp_path / "store", events.append)
        assert [event.text.startswith(said) for event in events if isinstance(event, Noted)].count(True) == 1
    known = ["harvest", "--model", model, "--dataset", "builtin:pydoc", "--site", "resid.1", "--rows", 500]
    done = gsae(*known, "--context-size", 65, "--dry-run", "--json", "--out", tmp_path / "other")
    assert done.stderr.count(said) == 1
    assert json.loads(done.stdout)["context_size"] == 65


def test_an_error_of_the_models_own_code_is_one_line(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    usual = LlamaDecoderLayer.forward

    def fails(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.shape[1] == 40:
            raise IndexError("index out of range in self")
        return usual(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", fails)
    known = ["harvest", "--model", tiny_llama, "--dataset", "builtin:pydoc", "--site", "resid.1", "--rows", 500]
    known += ["--context-size", 40, "--batch-size", 4, "--out", tmp_path / "store"]
    said = "The pass of LlamaForCausalLM over tokens of shape (4, 40) fails: IndexError: index out of range in self."
    refused(2, said, *known)
    refused(2, said, *known[:-1], tmp_path / "dry", "--dry-run")
    refused(2, "LlamaForCausalLM over tokens of shape", *known[:-1], tmp_path / "auto", "--batch-size", "auto")


def test_running_out_of_memory_is_still_no_space(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    usual = LlamaDecoderLayer.forward

    def fails(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.shape[1] == 40:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)")
        return usual(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", fails)
    known = ["harvest", "--model", tiny_llama, "--dataset", "builtin:pydoc", "--site", "resid.1", "--rows", 500]
    refused(6, "does not fit into memory, tried twice", *known, "--context-size", 40, "--out", tmp_path / "store")
