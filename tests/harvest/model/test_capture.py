"""The language model: loaded as it is on disk, run up to the last site."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from gsae.errors import GsaeError, NotFoundError, UsageError
from gsae.harvest import LanguageModel, capture, load_lm, load_meta, load_tokenizer, resolve, tokenizer_sha256
from gsae.harvest.model import model_files as models

SITES = ["resid.0", "mlp.1", "attn.1", "resid.2", "module:model.layers.0.mlp:in"]


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_lm(str(tiny_llama))


@pytest.fixture(scope="module")
def tokens(lm: LanguageModel) -> Tensor:
    made = torch.randint(4, 1024, (5, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    made[:, 0] = lm.tokenizer.bos_token_id
    return made


def test_captured_bits_are_those_of_a_whole_pass(lm: LanguageModel, tokens: Tensor, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    seen: dict[str, Tensor] = {}
    layers = whole.model.layers
    layers[0].register_forward_hook(lambda m, a, out: seen.update({"resid.0": out}))
    layers[0].mlp.register_forward_pre_hook(lambda m, a: seen.update({SITES[4]: a[0]}))
    layers[1].mlp.register_forward_hook(lambda m, a, out: seen.update({"mlp.1": out}))
    layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update({"attn.1": a[0]}))
    layers[2].register_forward_hook(lambda m, a, out: seen.update({"resid.2": out}))
    with torch.no_grad():
        whole(input_ids=tokens.long())
    found = capture(lm, resolve(lm.model, SITES), tokens)
    assert found.keys() == seen.keys()
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, seen[name]), name


def test_a_pass_ends_at_the_last_site_and_leaves_the_model_unchanged(lm: LanguageModel, tokens: Tensor) -> None:
    ran: list[str] = []
    watched = {name: module for name, module in lm.model.named_modules() if name}
    before = lm.model(input_ids=tokens.long()).logits
    sites = resolve(lm.model, ["attn.1", "resid.0"])
    handles = [
        module.register_forward_pre_hook(lambda m, a, name=name: ran.append(name)) for name, module in watched.items()
    ]
    capture(lm, sites, tokens)
    for handle in handles:
        handle.remove()
    assert "model.layers.1.self_attn" in ran
    assert not [
        name for name in ran if name.startswith(("model.layers.1.mlp", "model.layers.2", "model.norm", "lm_head"))
    ]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.values())
    assert torch.equal(lm.model(input_ids=tokens.long()).logits, before)


def test_captured_tensors_can_be_trained_on(lm: LanguageModel, tokens: Tensor) -> None:
    found = capture(lm, resolve(lm.model, ["mlp.0"]), tokens)["mlp.0"]
    weight = torch.ones(32, dtype=found.dtype, requires_grad=True)
    (found @ weight).sum().backward()
    assert weight.grad is not None


def test_a_site_that_the_pass_never_reaches_is_named(lm: LanguageModel, tokens: Tensor) -> None:
    (site,) = resolve(lm.model, ["mlp.1"])
    never = site.model_copy(update={"name": "module:model.layers:out", "module": "model.layers"})
    with pytest.raises(UsageError, match=r"never reaches site 'module:model\.layers:out'"):
        capture(lm, [site, never], tokens)


def test_loading_prints_nothing_and_gives_a_model_without_gradients(
    tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_lm(str(tiny_llama), dtype="float16", device="auto", attn_implementation="eager")
    assert capfd.readouterr() == ("", "")
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float16}
    assert loaded.provenance.attn_implementation == loaded.model.config._attn_implementation == "eager"


def test_provenance_identifies_weights_and_tokenizer_but_not_their_path(
    lm: LanguageModel, tiny_llama: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / tiny_llama.name
    shutil.copytree(tiny_llama, moved)
    assert load_lm(str(moved)).provenance == lm.provenance
    assert lm.provenance.id == "tiny-llama"
    assert tokenizer_sha256(load_tokenizer(str(moved))) == lm.provenance.tokenizer_sha256
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load_lm(str(moved)).provenance.weights_sha256 != lm.provenance.weights_sha256


def test_the_tokenizers_hash_does_not_depend_on_its_use(lm: LanguageModel) -> None:
    lm.tokenizer(["some text"] * 3, add_special_tokens=False, split_special_tokens=True, verbose=False)
    assert tokenizer_sha256(lm.tokenizer) == lm.provenance.tokenizer_sha256


def test_a_meta_model_has_modules_and_no_weights(tiny_llama: Path) -> None:
    model = load_meta(str(tiny_llama))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert resolve(model, ["attn.2"])[0].d_in == 32


def without(place: Path, tiny_llama: Path, *names: str) -> Path:
    shutil.copytree(tiny_llama, place, ignore=shutil.ignore_patterns(*names))
    return place


def test_an_incomplete_model_directory_is_refused_in_one_line(tmp_path: Path, tiny_llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    fewer = without(tmp_path / "fewer", tiny_llama)
    tensors = load_file(fewer / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, fewer / "model.safetensors", {"format": "pt"})
    cut = without(tmp_path / "cut", tiny_llama)
    os.truncate(cut / "model.safetensors", 5000)
    cases: list[tuple[Path, type[GsaeError], str]] = [
        (without(tmp_path / "a", tiny_llama, "tokenizer*"), UsageError, "has no tokenizer"),
        (without(tmp_path / "b", tiny_llama, "config.json"), NotFoundError, "has no config.json"),
        (
            without(tmp_path / "c", tiny_llama, "*.safetensors"),
            NotFoundError,
            r"'c' has no weights: no model\.safetensors",
        ),
        (fewer, UsageError, r"lack 1 tensors, such as model\.layers\.1\.mlp\.up_proj\.weight\."),
        (cut, UsageError, "'cut' cannot be loaded"),
    ]
    for place, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            load_lm(str(place))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "kind", "said"),
    [
        ("builtin:gpt5", NotFoundError, r"There are: builtin:smollm2-135m, builtin:smollm2-135m-instruct-q4\."),
        ("/no/such/directory", NotFoundError, r"no model '/no/such/directory': no such local path"),
        ("no-such.gguf", NotFoundError, r"no model 'no-such\.gguf': no such local path"),
        (__file__, UsageError, r"is a file, but no \.gguf file"),
    ],
)
def test_a_model_that_does_not_exist_is_refused_in_one_line(model: str, kind: type[GsaeError], said: str) -> None:
    with pytest.raises(kind, match=said):
        load_lm(model)


def test_a_builtin_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.BUILTINS, "builtin:smollm2-135m", ("not-installed-anywhere", "x.gguf"))
    with pytest.raises(NotFoundError, match="pip install not-installed-anywhere"):
        load_lm("builtin:smollm2-135m")


@pytest.mark.parametrize("device", ["abacus", "cuda:77"])
def test_a_device_that_does_not_exist_is_named(tiny_llama: Path, device: str) -> None:
    with pytest.raises(UsageError, match=f"Device '{device}' cannot be used"):
        load_lm(str(tiny_llama), device=device)


def test_a_damaged_gguf_file_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSAE_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(50))
    with pytest.raises(UsageError, match=r"broken\.gguf' cannot be read"):
        load_tokenizer(str(broken))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_two_threads_that_unpack_one_file_at_once_both_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"x")
    both, places = Barrier(2), []

    def save(out: Path) -> None:
        (out / "weights").write_text("w")
        both.wait(10)

    def unpack() -> None:
        places.append(models._unpack(tmp_path / "x.gguf", "bfloat16", save))

    threads = [Thread(target=unpack) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(places)) == 1
    assert len(places) == 2
    assert [p.name for p in places[0].parent.iterdir()] == ["bfloat16"]
    assert (places[0] / "weights").read_text() == "w"


@pytest.mark.slow
def test_importing_the_room_imports_neither_transformers_nor_datasets() -> None:
    code = "import sys, gsae.harvest.facade; print({'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
