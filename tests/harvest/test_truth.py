"""The rows of a harvested store are the model's, bit for bit, in every family and dtype, and a row is the same token at
all sites. The expected values are computed here, from transformers and numpy alone.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gsae.harvest import HarvestConfig, LanguageModel, capture, harvest, load_lm, resolve
from gsae.tests.support.batch_plan import planned_batches
from gsae.tests.support.families import FAMILIES, built

CONTEXT_SIZE, WINDOW_ROWS, BATCH_SIZE, ROWS, LAYER = 32, 256, 3, 420, 1
# Their code has no sdpa; Gemma 2 would lose its soft caps with it.
WITHOUT_SDPA = ("Gemma2", "GPTJ", "Bloom")
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short documents, so that held-out ones are among them."""
    from pydoc_data.topics import topics

    file: Path = tmp_path_factory.mktemp("text") / "short.jsonl"
    whole = topics["typesmapping"] + topics["strings"] + topics["try"]
    file.write_text("".join(json.dumps({"text": whole[150 * n : 150 * (n + 1)]}) + "\n" for n in range(60)))
    return file


def config(model: Path, text: Path, dtype: str = "bfloat16", **changed: Any) -> HarvestConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "dataset": str(text),
        "sites": tuple(f"{kind}.{LAYER}" for kind in ("resid", "mlp", "attn")),
        "rows": ROWS,
        "context_size": CONTEXT_SIZE,
        "heldout": 0.3,
        "window_rows": WINDOW_ROWS,
        "batch_size": BATCH_SIZE,
        "dtype": dtype,
        "codec": "planes" if dtype == "bfloat16" else "zstd",
    }
    return HarvestConfig(**(settings | changed))


def recorded(config: HarvestConfig, calls: list[np.ndarray]) -> LanguageModel:
    """Load the model so that it records the ids of every forward call."""
    lm = load_lm(config.model, dtype=config.dtype, attn_implementation=config.attn_implementation)
    lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].numpy().copy()), with_kwargs=True
    )
    return lm


@contextmanager
def hooks(model: Any, family: str, seen: dict[str, Tensor]) -> Iterator[None]:
    """Record the activations at the three sites, by the module names of the family's own code."""
    own = FAMILIES[family]
    layer = f"{own.layers}.{LAYER}"

    def output(name: str) -> Any:
        return lambda module, args, out: seen.update({name: (out[0] if isinstance(out, tuple) else out).clone()})

    handles = [
        model.get_submodule(layer).register_forward_hook(output("resid")),
        model.get_submodule(f"{layer}.{own.mlp}").register_forward_hook(output("mlp")),
        model.get_submodule(f"{layer}.{own.attention}.{own.projection}").register_forward_pre_hook(
            lambda module, args: seen.update({"attn": args[0].clone()})
        ),
    ]
    yield
    for handle in handles:
        handle.remove()


def of_plain_passes(model: Any, family: str, calls: list[np.ndarray]) -> dict[str, dict[tuple[int, ...], Tensor]]:
    """Run the batches through the whole model; return each context's activations (context_size, d) by its ids."""
    found: dict[str, dict[tuple[int, ...], Tensor]] = {"resid": {}, "mlp": {}, "attn": {}}
    seen: dict[str, Tensor] = {}
    with hooks(model, family, seen), torch.no_grad():
        for ids in calls:
            model(input_ids=torch.from_numpy(ids), use_cache=False)
            for kind, value in seen.items():
                found[kind] |= zip(map(tuple, ids.tolist()), value.reshape(*ids.shape, -1), strict=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_rows_of_a_store_are_the_bits_of_a_plain_pass(
    family: str, dtype: str, text: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    place = tmp_path / "model"
    built(family, vocab_size=len(tiny_tokenizer)).to(kind).save_pretrained(place)
    tiny_tokenizer.save_pretrained(place)
    calls: list[np.ndarray] = []
    store = harvest(config(place, text, dtype), tmp_path / "store", load=lambda c: recorded(c, calls))
    assert store is not None
    assert store.plan.model.attn_implementation == ("eager" if family in WITHOUT_SDPA else "sdpa")
    plain = AutoModelForCausalLM.from_pretrained(place, dtype=kind).eval()
    expected = of_plain_passes(plain, family, calls)
    tokens = store.tokens()
    draw = np.random.default_rng(0)
    compared = 0
    for split in ("train", "heldout"):
        sites = {k: store.site(f"{k}.{LAYER}", split) for k in expected}  # type: ignore[arg-type]
        rows = draw.choice(sites["mlp"].rows, min(200, sites["mlp"].rows), replace=False)
        source = np.concatenate([s for s, _ in sites["mlp"].in_order()])[rows]
        for name, site in sites.items():
            for row, (context, position) in zip(
                site[rows], zip(*divmod(source, CONTEXT_SIZE), strict=True), strict=True
            ):
                same = expected[name][tuple(tokens[context].tolist())][position]
                assert row.dtype == same.dtype == kind
                assert torch.equal(row.view(BITS[kind]), same.view(BITS[kind])), (name, context, position)
        compared += len(rows)
    assert compared >= 300


@pytest.mark.slow
def test_the_ids_of_every_forward_call_follow_the_plans_batches(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    calls: list[np.ndarray] = []
    store = harvest(config(tiny_llama, text), tmp_path / "store", load=lambda c: recorded(c, calls))
    assert store is not None
    planned = planned_batches(store)
    confirming, *calls = calls
    assert confirming.size <= 32
    assert len(calls) == len(planned) > 8
    for call, batch in zip(calls, planned, strict=True):
        assert np.array_equal(call, batch)


def test_counts_are_exact_and_no_held_out_document_is_in_train(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    store = harvest(config(tiny_llama, text, rows=None), tmp_path / "store")
    assert store is not None
    tokens, split, documents = store.tokens(), store.split(), store.documents()
    ordinary = ~np.isin(tokens, store.plan.tokenizer.excluded_ids)
    names: list[set[int]] = []
    for number, name in enumerate(("train", "heldout")):
        source = np.concatenate([s for s, _ in store.site("mlp.1", name).in_order()])  # type: ignore[arg-type]
        assert sorted(source.tolist()) == np.flatnonzero((ordinary & (split == number)[:, None]).ravel()).tolist()
        owner = np.searchsorted(documents["start"], source, side="right") - 1
        assert (documents["split"][owner] == number).all()
        names.append(set(documents["id"][owner].tolist()))
    assert not names[0] & names[1]
    assert len(names[1]) > 5


def test_nothing_after_the_site_runs_in_a_model_of_thirty_layers(tiny_tokenizer: Any) -> None:
    model = built("Llama", num_hidden_layers=30)
    ran: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(lambda m, a, name=name: ran.update([name]))
    lm = LanguageModel(model, None, None)  # type: ignore[arg-type]
    for sites, last in ((["mlp.3"], 3), (["attn.3", "resid.1"], 3), (["resid.3"], 3), (["mlp.3", "attn.7"], 7)):
        found = resolve(model, sites)
        ran.clear()
        capture(lm, found, torch.randint(4, 64, (2, 9)))
        layers = {name.removeprefix("model.layers.").split(".")[0] for name in ran if name.startswith("model.layers.")}
        assert layers == {str(n) for n in range(last + 1)}
        assert ran["model.layers.2.mlp.down_proj"] == 1
        assert not {"model.norm", "lm_head"} & set(ran)
        if "attn" in sites[-1] or sites[0].startswith("attn"):
            assert not [name for name in ran if name.startswith(f"model.layers.{last}.mlp")]


@pytest.mark.parametrize("family", ["Gemma2", "GPTNeoX", "GPT2", "Bloom"])
def test_nothing_after_an_mlp_runs_in_its_own_layer(family: str) -> None:
    model, own = built(family), FAMILIES[family]
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, a, name=name: ran.append(name))
    capture(LanguageModel(model, None, None), resolve(model, ["mlp.1"]), torch.randint(4, 64, (2, 9)))  # type: ignore[arg-type]
    assert ran[-1].startswith(f"{own.layers}.1.{own.mlp}")
