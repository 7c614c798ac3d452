"""`--dtype auto`: the checkpoint's dtype, resolved before the plan."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gsae.errors import UsageError
from gsae.harvest import HarvestConfig, harvest, load_lm, make_request
from gsae.harvest.model.checkpoint_dtype import checkpoint_dtype
from gsae.harvest.model.model_files import find_model
from gsae.tests.support.command import gsae, refused


def folder(tiny_llama: Path, place: Path, stored: torch.dtype, **config: Any) -> Path:
    """Copy a model, its weights but the norms `stored` so, with these fields of its config; None removes one."""
    shutil.copytree(tiny_llama, place)
    tensors = load_file(place / "model.safetensors")
    other = {name: value.float() if "norm" in name else value.to(stored) for name, value in tensors.items()}
    save_file(other, place / "model.safetensors", {"format": "pt"})
    known = json.loads((place / "config.json").read_text()) | config
    (place / "config.json").write_text(json.dumps({k: v for k, v in known.items() if v is not None}))
    return place


def settings_of(model: Path, **more: Any) -> HarvestConfig:
    known: dict[str, Any] = {"model": str(model), "dataset": "builtin:pydoc", "sites": ("mlp.1",), "rows": 300}
    known |= {"context_size": 64, "window_rows": 256, "heldout": 0.02, "device": "cpu", "dtype": "auto"}
    return HarvestConfig(**known | more)


@pytest.mark.parametrize(
    ("stored", "config", "expected"),
    [
        (torch.bfloat16, {}, "bfloat16"),
        (torch.bfloat16, {"dtype": "float32"}, "float32"),
        (torch.bfloat16, {"dtype": None, "torch_dtype": "float16"}, "float16"),
        (torch.float16, {"dtype": None}, "float16"),
    ],
)
def test_the_dtype_is_that_of_the_config_or_else_of_the_weights(
    tiny_llama: Path, tmp_path: Path, stored: torch.dtype, config: dict[str, Any], expected: str
) -> None:
    place = folder(tiny_llama, tmp_path / "model", stored, **config)
    assert make_request(settings_of(place, codec="zstd")).config.dtype == expected
    lm = load_lm(str(place), dtype="auto")
    assert lm.provenance.dtype == expected
    assert {p.dtype for p in lm.model.parameters()} == {getattr(torch, expected)}


def test_the_text_model_counts_where_the_whole_model_says_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    place = folder(tiny_llama, tmp_path / "model", torch.bfloat16, dtype=None, text_config={"torch_dtype": "float16"})
    assert checkpoint_dtype(find_model(str(place), None, weights=True)) == "float16"


def test_weights_in_pickles_are_read_too(tiny_llama: Path, tmp_path: Path) -> None:
    place = folder(tiny_llama, tmp_path / "model", torch.float16, dtype=None)
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    assert make_request(settings_of(place, codec="zstd")).config.dtype == "float16"


@pytest.mark.slow
def test_a_harvest_with_auto_is_the_harvest_with_the_dtype_itself(tiny_llama: Path, tmp_path: Path) -> None:
    place = folder(tiny_llama, tmp_path / "model", torch.float32, dtype=None)
    auto = harvest(settings_of(place, codec="zstd"), tmp_path / "auto")
    named = harvest(settings_of(place, codec="zstd", dtype="float32"), tmp_path / "named")
    assert auto is not None
    assert named is not None
    assert auto.plan.model.dtype == "float32"
    assert (auto.path / "plan.json").read_bytes() == (named.path / "plan.json").read_bytes()
    assert auto.digest == named.digest
    assert harvest(settings_of(place, codec="zstd"), named.path) is not None
    command = ["harvest", "--dry-run", "--no-probe", "--dtype", "auto", "--model", place, "--dataset", "builtin:pydoc"]
    command += ["--site", "mlp.1", "--rows", 10, "--context-size", 64, "--codec", "zstd", "--out", tmp_path, "--json"]
    done = gsae(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_bytes"] == 4 * sum(p.numel() for p in load_lm(str(place)).model.parameters())


def test_what_a_store_cannot_hold_is_refused_in_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    double = folder(tiny_llama, tmp_path / "double", torch.float64, dtype=None)
    eight = folder(tiny_llama, tmp_path / "eight", torch.float8_e4m3fn, dtype=None)
    named = folder(tiny_llama, tmp_path / "named", torch.float16, dtype="float64")
    broken = folder(tiny_llama, tmp_path / "broken", torch.float16, dtype=None)
    (broken / "model.safetensors").write_bytes(b"nothing")
    none = folder(tiny_llama, tmp_path / "none", torch.float16, dtype=None)
    (none / "model.safetensors").unlink()
    full = folder(tiny_llama, tmp_path / "full", torch.float16, dtype="float32")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    cases = {
        double: "model 'double' has dtype float64, which a store cannot hold. Give --dtype bfloat16, float16, float32.",
        eight: "model 'eight' has dtype float8_e4m3fn, which a store cannot hold",
        named: "has dtype float64",
        broken: "is not a safetensors file",
        none: "neither config.json nor the weights of 'none' say",
        full: "codec: planes is for rows of bfloat16, float16; got dtype float32",
        tmp_path / "x.gguf": "is a GGUF file, which has no one dtype",
    }
    for place, said in cases.items():
        command = ["harvest", "--model", place, "--dataset", "builtin:pydoc", "--site", "mlp.1", "--context-size", 64]
        refused(2, said, *command, "--dtype", "auto", "--out", tmp_path / "store")
        if place != full:
            with pytest.raises(UsageError):
                load_lm(str(place), dtype="auto")
    assert not (tmp_path / "store").exists()
