"""Quantised checkpoints: run as transformers runs them, recorded in the plan, refused where they cannot run.

BitNet is the method that needs no package, no GPU and no calibration, so it stands for all that are run here.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gsae.errors import IncompatibleError, UsageError
from gsae.harvest import (
    HarvestConfig,
    capture,
    harvest,
    harvest_tokens,
    load_lm,
    load_meta,
    load_planned,
    make_request,
    offered,
    resolve,
)
from gsae.harvest.hub import quiet
from gsae.store import Store, describe
from gsae.tests.support.command import refused
from gsae.tests.support.selection import mostly_slow

BITNET = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}


def declared(tiny_llama: Path, place: Path, quantization: Any, **more: Any) -> Path:
    """Copy a model with a quantization_config, without changing its weights."""
    shutil.copytree(tiny_llama, place)
    config = json.loads((place / "config.json").read_text()) | {"quantization_config": quantization} | more
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.fixture(scope="module")
def bitnet(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with its projections rounded to -1, 0 and 1, four to a byte."""
    with quiet(bars=False):  # it imports torch's compiler
        from transformers.integrations.bitnet import pack_weights

    place = declared(tiny_llama, tmp_path_factory.mktemp("quantised") / "ternary", BITNET)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(place / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = value.float().abs().mean()
            tensors[name] = pack_weights((value.float() / scale).round().clamp(-1, 1))
            tensors[f"{name}_scale"] = (1 / scale).to(torch.bfloat16).reshape(1)
        else:
            tensors[name] = value
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture(autouse=True, scope="module")
def uncompiled() -> Iterator[None]:
    """BitNet's unpacking is compiled by torch, for which tests have no time."""
    with torch.compiler.set_stance("force_eager"):
        yield


def settings_of(model: Path, **more: Any) -> HarvestConfig:
    known: dict[str, Any] = {"model": str(model), "dataset": "builtin:pydoc", "sites": ("mlp.1",), "rows": 300}
    known |= {"context_size": 64, "window_rows": 256, "heldout": 0.02, "device": "cpu"}
    return HarvestConfig(**known | more)


@pytest.fixture(scope="module")
def store(bitnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = harvest(settings_of(bitnet), tmp_path_factory.mktemp("stores") / "store")
    assert made is not None
    return made


@pytest.mark.parametrize("dtype", mostly_slow(["bfloat16", "float32"], "float32"))
def test_rows_are_those_of_transformers_own_model(bitnet: Path, tiny_llama: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(4, 1024, (2, 16), generator=torch.Generator().manual_seed(0))
    with quiet(bars=False):
        whole: Any = AutoModelForCausalLM.from_pretrained(bitnet, dtype=getattr(torch, dtype)).eval()
    seen: dict[str, Tensor] = {}
    whole.model.layers[1].mlp.register_forward_hook(lambda m, a, out: seen.update({"mlp.1": out}))
    whole.model.layers[2].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update({"attn.2": a[0]}))
    with torch.no_grad():
        whole(input_ids=tokens)
    lm = load_lm(str(bitnet), dtype=dtype)
    assert type(lm.model.model.layers[0].mlp.down_proj).__name__ in ("BitLinear", "AutoBitLinear")
    found = capture(lm, resolve(load_meta(str(bitnet)), seen), tokens)
    assert all(torch.equal(found[name], value) and value.dtype == getattr(torch, dtype) for name, value in seen.items())
    assert list(offered(load_meta(str(bitnet)))) == list(offered(load_meta(str(tiny_llama))))


def test_the_plan_records_the_method_and_the_config(store: Store, bitnet: Path, tmp_path: Path) -> None:
    recorded = store.plan.model.quantization
    assert recorded is not None
    assert (recorded.method, recorded.dequantized) == ("bitnet", False)
    assert store.plan.schema_version == "1.1"
    assert json.loads((store.path / "plan.json").read_text())["model"]["quantization"].keys() == {"method", "sha256"}
    assert describe(store.path)["quantization"]["method"] == "bitnet"
    begun, other = tmp_path / "store", tmp_path / "ternary"
    shutil.copytree(store.path, begun)
    (begun / "manifest.json").unlink()
    (begun / "shards" / "train-00001.json").unlink()
    shutil.copytree(bitnet, other)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "embed_tokens"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleError, match=r"model\.quantization\.sha256 was"):
        harvest(settings_of(other), begun)
    with pytest.raises(IncompatibleError, match=r"are quantised in another way here than .*bitnet"):
        load_planned(store.plan.model, str(other))
    again = harvest(settings_of(bitnet), begun)
    assert again is not None
    assert again.digest == store.digest
    assert load_planned(store.plan.model, str(bitnet)).provenance.weights_sha256 == store.plan.model.weights_sha256


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [32, 32]},
            "by fp8, which needs a GPU. Use --device",
        ),
        ({"quant_method": "mxfp4"}, "is quantised by mxfp4, which needs a GPU"),
        pytest.param(
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes, which cannot be loaded here: .*pip",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"load_in_8bit": True},
            "is quantised by bitsandbytes, which cannot be loaded here: .*pip install",
            marks=pytest.mark.slow,
        ),
        (
            {"quant_method": "gptq", "bits": 4},
            "by gptq, which cannot be loaded here: .*pip install optimum",
        ),
        pytest.param(
            {"quant_method": "awq", "bits": 4},
            "by awq, which cannot be loaded here: .*pip install gptqmodel",
            marks=pytest.mark.slow,
        ),
        (
            {"quant_method": "compressed-tensors"},
            "which cannot be loaded here: .*compressed.tensors",
        ),
        (
            {"quant_method": "magic"},
            "by magic, which cannot be loaded here: this version of transformers does not",
        ),
        ({"bits": 4}, "is quantised by an unnamed method, which cannot be loaded here: .*quant_method"),
    ],
    ids=lambda value: value.get("quant_method", "none") if isinstance(value, dict) else "",
)
def test_what_cannot_run_here_is_refused_in_one_line_before_the_text_is_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: dict[str, Any], said: str
) -> None:
    for package in ("bitsandbytes", "optimum", "gptqmodel", "compressed_tensors"):
        monkeypatch.setattr(f"transformers.utils.import_utils.is_{package}_available", lambda *_: False, raising=False)
    place = declared(tiny_llama, tmp_path / "model", quantization)
    for call in (lambda: make_request(settings_of(place)), lambda: load_lm(str(place))):
        with pytest.raises(UsageError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("Model 'model' is quantised")
    harvest_tokens(settings_of(place), tmp_path / "tokens")  # needs neither the packages nor a GPU


def test_the_command_refuses_before_it_writes(tiny_llama: Path, tmp_path: Path) -> None:
    place = declared(tiny_llama, tmp_path / "model", {"quant_method": "fp8"})
    command = ["harvest", "--model", place, "--dataset", "builtin:pydoc", "--site", "mlp.1", "--context-size", 64]
    for more in ((), ("--dry-run", "--rows", 10)):
        refused(2, "which needs a GPU", *command, "--device", "cpu", *more, "--out", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_loader_that_takes_another_dtype_is_refused(
    bitnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer

    monkeypatch.setattr(BitNetHfQuantizer, "update_dtype", lambda self, dtype: torch.float16)
    with pytest.raises(UsageError, match=r"which runs in float16 here, not in bfloat16\. Use --dtype float16\."):
        make_request(settings_of(bitnet))


def test_weights_that_transformers_dequantised_are_recorded_as_such(
    store: Store, bitnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer

    def dequantised(self: Any, model: Any, **_: Any) -> Any:
        self.remove_quantization_config(model)
        return model

    monkeypatch.setattr(BitNetHfQuantizer, "_process_model_after_weight_loading", dequantised)
    lm: Any = load_lm(str(bitnet))
    assert lm.provenance.quantization.dequantized
    with pytest.raises(IncompatibleError, match="would be dequantised here"):
        load_planned(store.plan.model, str(bitnet))
    begun = tmp_path / "store"
    shutil.copytree(store.path, begun)
    (begun / "manifest.json").unlink()
    (begun / "shards" / "train-00001.json").unlink()
    with pytest.raises(IncompatibleError, match=r"model\.quantization\.dequantized was None, now True"):
        harvest(settings_of(bitnet), begun)


def test_quantised_weights_without_their_config_are_refused(bitnet: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """FP8 weights, for instance, are floats: transformers would load them and ignore their scales."""
    place = tmp_path / "model"
    shutil.copytree(tiny_llama, place)
    tensors = load_file(place / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors | {f"{name}_scale": torch.ones(1)}, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"are quantised \(.*weight_scale\), and its config\.json has no"):
        load_lm(str(place))


def test_an_adapter_is_not_merged_into_quantised_weights(bitnet: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(bitnet), "r": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="cannot be merged into a quantised base without rounding"):
        make_request(settings_of(adapter))


def test_rows_of_another_dtype_than_the_plans_are_never_stored(tiny_llama: Path, tmp_path: Path) -> None:
    from gsae.harvest import LanguageModel

    def load(config: HarvestConfig) -> LanguageModel:
        lm = load_lm(config.model, dtype="float16")
        return LanguageModel(lm.model, lm.tokenizer, load_lm(config.model).provenance)

    with pytest.raises(UsageError, match=r"gives torch\.float16, and the store is of torch\.bfloat16"):
        harvest(settings_of(tiny_llama), tmp_path / "store", load=load)
