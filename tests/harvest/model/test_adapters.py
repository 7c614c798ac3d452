"""Adapters of peft: merged into the base that they name, recorded in the plan, refused where merging would be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from gsae.errors import GsaeError, IncompatibleError, NotFoundError, UsageError
from gsae.harvest import (
    HarvestConfig,
    capture,
    harvest,
    load_lm,
    load_meta,
    load_planned,
    make_request,
    offered,
    resolve,
    weights_are_local,
)
from gsae.harvest.hub import quiet
from gsae.store import Store, describe
from gsae.tests.support.command import gsae, refused

SITES = ["resid.0", "mlp.1", "attn.1", "resid.2"]
LAYERS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def make(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return what makes a random adapter of tiny-llama, with `kind` of peft and its settings."""

    def made(name: str, base: str | Path = tiny_llama, kind: Any = LoraConfig, **settings: Any) -> Path:
        from transformers import AutoModelForCausalLM

        out: Path = tmp_path_factory.mktemp("adapters") / name
        if kind is LoraConfig:
            settings = {"r": 4, "lora_alpha": 16, "target_modules": LAYERS} | settings
        with torch.random.fork_rng(), quiet(bars=False):
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
            adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", **settings))
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
            adapted.save_pretrained(str(out))
        config = json.loads((out / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
        return out

    return made


@pytest.fixture(scope="module")
def adapter(make: Callable[..., Path]) -> Path:
    return make("tuned")


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(4, 1024, (3, 24), generator=torch.Generator().manual_seed(0))


def unmerged(base: Path, adapter: Path, tokens: Tensor) -> dict[str, Tensor]:
    """Return the activations of peft's own model, which adds the adapter in each pass; with hooks of this test."""
    from transformers import AutoModelForCausalLM

    with quiet(bars=False):
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model: Any = PeftModel.from_pretrained(plain, str(adapter))
    seen: dict[str, Tensor] = {}
    layers = model.base_model.model.model.layers
    layers[0].register_forward_hook(lambda m, a, out: seen.update({"resid.0": out}))
    layers[1].mlp.register_forward_hook(lambda m, a, out: seen.update({"mlp.1": out}))
    layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update({"attn.1": a[0]}))
    layers[2].register_forward_hook(lambda m, a, out: seen.update({"resid.2": out}))
    with torch.no_grad():
        model.eval()(input_ids=tokens)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"use_dora": True}, marks=pytest.mark.slow),
        pytest.param(
            {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "layers_to_transform": [1]}, marks=pytest.mark.slow
        ),
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"kind": IA3Config, "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ],
    ids=["lora", "dora", "patterns", "saved modules", "ia3"],
)
def test_merged_rows_are_those_of_the_model_with_the_adapter_beside_it(
    make: Callable[..., Path], tiny_llama: Path, tokens: Tensor, settings: dict[str, Any]
) -> None:
    adapter = make("tuned", **settings)
    lm = load_lm(str(adapter), dtype="float32")
    found, expected = capture(lm, resolve(lm.model, SITES), tokens), unmerged(tiny_llama, adapter, tokens)
    plain = load_lm(str(tiny_llama), dtype="float32")
    without = capture(plain, resolve(plain.model, SITES), tokens)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max())), name
    assert not torch.allclose(found["resid.2"], without["resid.2"], rtol=1e-2, atol=1e-2)
    assert not any(type(module).__module__.startswith("peft") for module in lm.model.modules())
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def settings_of(model: Path) -> dict[str, Any]:
    known: dict[str, Any] = {"model": str(model), "dataset": "builtin:pydoc", "sites": ("mlp.1",), "rows": 600}
    return known | {"context_size": 64, "window_rows": 512, "heldout": 0.02, "device": "cpu"}


@pytest.fixture(scope="module")
def store(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = harvest(HarvestConfig(**settings_of(adapter)), tmp_path_factory.mktemp("stores") / "store")
    assert made is not None
    return made


def test_the_plan_records_the_adapter_and_its_base(store: Store, adapter: Path, tiny_llama: Path) -> None:
    model, base = store.plan.model, load_lm(str(tiny_llama)).provenance
    assert (model.id, model.revision) == ("tuned", None)
    assert model.base is not None
    assert (model.base.id, model.base.revision) == ("tiny-llama", None)
    assert model.base.weights_sha256 == base.weights_sha256
    assert len({model.weights_sha256, model.adapter_sha256, base.weights_sha256}) == 3
    assert store.plan.schema_version == "1.1"
    assert store.plan.tokenizer.id == "tiny-llama"
    assert "peft" in store.plan.versions
    facts = describe(store.path)
    assert facts["base"]["id"] == "tiny-llama"
    assert facts["adapter_sha256"] == model.adapter_sha256


@pytest.mark.slow
def test_a_harvest_of_the_base_itself_records_nothing_new(tiny_llama: Path, tmp_path: Path) -> None:
    made = harvest(HarvestConfig(**settings_of(tiny_llama)), tmp_path / "plain")
    assert made is not None
    assert made.plan.schema_version == "1.0"
    assert not {"base", "adapter_sha256"} & json.loads((made.path / "plan.json").read_text())["model"].keys()
    assert "peft" not in made.plan.versions
    assert "base" not in describe(made.path)


def test_a_stopped_harvest_goes_on_and_refuses_a_changed_adapter(
    store: Store, adapter: Path, make: Callable[..., Path], tmp_path: Path
) -> None:
    begun = tmp_path / "store"
    shutil.copytree(store.path, begun)
    (begun / "manifest.json").unlink()
    record = sorted((begun / "shards").glob("train-*.json"))[-1]
    record.unlink()
    other = make("tuned", lora_alpha=17)
    with pytest.raises(IncompatibleError, match=r"model\.adapter_sha256 was .*model\.weights_sha256 was"):
        harvest(HarvestConfig(**settings_of(other)), begun)
    with pytest.raises(IncompatibleError, match=r"model\.base was .*'tiny-llama'.*now None"):
        harvest(HarvestConfig(**settings_of(Path(store_base(adapter)))), begun)
    again = harvest(HarvestConfig(**settings_of(adapter)), begun)
    assert again is not None
    assert again.digest == store.digest


def store_base(adapter: Path) -> str:
    return str(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])


def test_the_model_of_the_store_is_loaded_again_from_any_place(
    store: Store, adapter: Path, make: Callable[..., Path], tiny_llama: Path, tmp_path: Path, tokens: Tensor
) -> None:
    moved, base = tmp_path / "moved", tmp_path / "base"
    shutil.copytree(adapter, moved)
    shutil.copytree(tiny_llama, base)
    config = json.loads((moved / "adapter_config.json").read_text()) | {"base_model_name_or_path": "../base"}
    (moved / "adapter_config.json").write_text(json.dumps(config))
    first, second = (load_planned(store.plan.model, str(place)) for place in (adapter, moved))
    assert first.provenance.weights_sha256 == second.provenance.weights_sha256
    sites = resolve(first.model, SITES)
    a, b = capture(first, sites, tokens), capture(second, sites, tokens)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for wrong in (tiny_llama, make("tuned", lora_alpha=17)):
        with pytest.raises(IncompatibleError, match="has different weights than 'tuned'"):
            load_planned(store.plan.model, str(wrong))


@pytest.mark.slow
def test_sites_a_dry_run_and_the_tokenizer_come_from_the_base(
    adapter: Path, tiny_llama: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    assert list(offered(load_meta(str(adapter)))) == list(offered(load_meta(str(tiny_llama))))
    assert gsae("sites", adapter).stdout == gsae("sites", tiny_llama).stdout
    assert weights_are_local(str(adapter), None)
    request = make_request(HarvestConfig(**settings_of(adapter)))
    assert (request.tokenizer_id, request.model_bytes) == (
        "tiny-llama",
        make_request(HarvestConfig(**settings_of(tiny_llama))).model_bytes,
    )
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    tiny_tokenizer.save_pretrained(own)
    assert make_request(HarvestConfig(**settings_of(own))).tokenizer_id == "own"
    dry = ["harvest", "--dry-run", "--model", adapter, "--dataset", "builtin:pydoc", "--site", "mlp.1", "--rows", 600]
    done = gsae(*dry, "--context-size", 64, "--batch-size", 2, "--device", "cpu", "--out", tmp_path / "store", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "tuned"


def change(adapter: Path, place: Path, **config: Any) -> Path:
    shutil.copytree(adapter, place)
    known = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(known | config))
    return place


def test_an_adapter_that_cannot_be_merged_is_refused_before_the_text_is_read(
    make: Callable[..., Path], adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    both = change(adapter, tmp_path / "both")
    for file in tiny_llama.iterdir():
        shutil.copy(file, both)
    broken = change(adapter, tmp_path / "broken")
    (broken / "adapter_config.json").write_text("[]")
    cases: list[tuple[Path, type[GsaeError], str]] = [
        (
            make("p", kind=PromptTuningConfig, num_virtual_tokens=3),
            UsageError,
            "'p' cannot be merged: PROMPT_TUNING adds",
        ),
        (make("q", kind=PrefixTuningConfig, num_virtual_tokens=3), UsageError, "PREFIX_TUNING adds to the context"),
        (change(adapter, tmp_path / "a", alora_invocation_tokens=[5]), UsageError, "it has alora_invocation_tokens"),
        (change(adapter, tmp_path / "r", layer_replication=[[0, 2], [1, 3]]), UsageError, "it has layer_replication"),
        (change(adapter, tmp_path / "k", peft_type="NO_SUCH"), UsageError, "'k' cannot be read"),
        (change(adapter, tmp_path / "n", base_model_name_or_path=None), UsageError, "names no base: set base_model"),
        (
            change(adapter, tmp_path / "g", base_model_name_or_path="/no/such"),
            NotFoundError,
            "'g' needs its base.*'/no/such'",
        ),
        (change(adapter, tmp_path / "t", base_model_name_or_path=str(adapter)), UsageError, "is an adapter too"),
        (both, UsageError, "holds both a model and an adapter"),
        (broken, UsageError, r"adapter_config\.json' is not a JSON object"),
    ]
    for place, kind, said in cases:
        for ask in (
            lambda place=place: make_request(HarvestConfig(**settings_of(place))),
            lambda place=place: load_lm(str(place)),
        ):
            with pytest.raises(kind, match=said) as caught:
                ask()
            assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be merged with --device-map"):
        make_request(HarvestConfig(**settings_of(adapter), device_map="auto"))


def test_an_adapter_that_does_not_fit_its_base_is_refused(
    make: Callable[..., Path], adapter: Path, tiny_llama: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    def without(place: Path, *gone: str, **more: Tensor) -> Path:
        shutil.copytree(adapter, place)
        tensors = load_file(place / "adapter_model.safetensors")
        kept = {name: value for name, value in tensors.items() if not name.endswith(gone or ("nothing",))} | more
        save_file(kept, place / "adapter_model.safetensors", {"format": "pt"})
        return place

    tied = tmp_path / "tied-llama"
    config = LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tied)
    tiny_tokenizer.save_pretrained(tied)
    weightless = without(tmp_path / "w")
    (weightless / "adapter_model.safetensors").unlink()
    extra = {"base_model.model.model.layers.7.mlp.down_proj.lora_A.weight": torch.ones(4, 64)}
    nan = {"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": torch.full((4, 64), torch.nan)}
    cases: list[tuple[Path, type[GsaeError], str]] = [
        (
            without(tmp_path / "m", "1.mlp.down_proj.lora_B.weight"),
            UsageError,
            "it lacks 1 tensors, such as .*down_proj",
        ),
        (without(tmp_path / "x", **extra), UsageError, r"the base has no place for 1 tensors, such as .*layers\.7"),
        (without(tmp_path / "y", **nan), UsageError, "'y' cannot be merged into its base: .*[nN]a[nN]"),
        (
            make("e", tied, target_modules=["embed_tokens"]),
            UsageError,
            "changes model.embed_tokens, and the base uses the",
        ),
        (
            make("h", tied, target_modules=["lm_head"]),
            UsageError,
            "changes lm_head, and the base uses the same weights",
        ),
        (weightless, NotFoundError, r"'.*w' has no weights: no adapter_model\.safetensors"),
    ]
    for place, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            load_lm(str(place), dtype="float32")
        assert "\n" not in str(caught.value)


def test_without_peft_the_command_to_install_it_is_named(
    adapter: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    command = ["harvest", "--model", adapter, "--dataset", "builtin:pydoc", "--site", "mlp.1", "--context-size", 64]
    refused(
        3, "The package peft is not installed. Install it: pip install 'gsae[peft]'", *command, "--out", tmp_path / "s"
    )
    assert not (tmp_path / "s").exists()
    assert load_lm(str(tiny_llama)).provenance.id == "tiny-llama"
