"""Models that also take images: the rows of their text decoder, without the towers, are those of the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gsae.errors import UsageError
from gsae.harvest import HarvestConfig, capture, effects, harvest, load_lm, load_meta, load_planned, offered, resolve
from gsae.harvest.hub import quiet
from gsae.harvest.model import loading, random_instance
from gsae.harvest.model.model_classes import Dropped, auto_class, drop_towers
from gsae.tests.support.causal_lms import tiny_model
from gsae.tests.support.children import files
from gsae.tests.support.command import gsae, refused
from gsae.tests.support.selection import mostly_slow

# The tower is as wide as the text, so that widths do not tell them apart.
TEXT = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048}
TEXT |= {"initializer_range": 0.2, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER |= {"image_size": 16, "patch_size": 8}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
SIGLIP = {"model_type": "siglip_vision_model"}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {"text": {"model_type": "gemma3_text"}, "tower": SIGLIP, "mm_tokens_per_image": 4},
    "llava": {"text": {"model_type": "llama"}, "tower": {"model_type": "clip_vision_model"}},
    "llava_next": {"text": {"model_type": "mistral"}, "tower": {"model_type": "clip_vision_model"}},
    "mistral3": {"text": {"model_type": "mistral"}, "tower": {"model_type": "pixtral"}},
    "idefics3": {"text": {"model_type": "llama"}, "tower": {}},
    "internvl": {"text": {"model_type": "qwen2"}, "tower": {"image_size": [16, 16], "patch_size": [8, 8]}},
    "qwen2_5_vl": {"text": ROPE, "tower": QWEN_TOWER},
    "qwen3_vl": {"text": ROPE, "tower": QWEN_TOWER | {"deepstack_visual_indexes": [0]}},
    "llama4": {"text": {"intermediate_size_mlp": 48, "num_local_experts": 2}, "tower": {}},
}
# Causal language models of which one class holds the text decoder and towers, and the paths of the towers.
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}
AUDIO = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_blocks": 2}
AUDIO |= {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 16}
WITHIN: dict[str, tuple[dict[str, Any], set[str]]] = {
    "git": ({"vision_config": VISION}, {"git.image_encoder"}),
    "phi4_multimodal": (
        {"vision_config": VISION, "audio_config": AUDIO},
        {f"model.embed_tokens_extend.{part}" for part in ("image_embed.img_processor", "audio_embed.encoder")},
    ),
}
IMAGE_IDS = {"image_token_id": 1000, "image_token_index": 1000, "video_token_id": 1001, "vision_start_token_id": 1002}


def save_random(auto: Any, config: Any, tokenizer: Any, place: Path) -> Path:
    """Save a random model of a config and a tokenizer in a folder; return the folder."""
    with torch.random.fork_rng(), quiet(bars=False):
        torch.manual_seed(0)
        model = auto.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.to(torch.bfloat16).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module", params=mostly_slow(FAMILIES, "gemma3"))
def multimodal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with a random model of a family, text decoder and tower, and a tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    own = dict(FAMILIES[request.param])
    place: Path = tmp_path_factory.mktemp("multimodal") / str(request.param)
    parts = {"text_config": TEXT | own.pop("text"), "vision_config": TOWER | own.pop("tower")}
    config = CONFIG_MAPPING[request.param](**parts, **own, **IMAGE_IDS)
    return save_random(AutoModelForImageTextToText, config, tiny_tokenizer, place)


def activations_of_the_whole_model(place: Path, tokens: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Return what the layers of the whole model give for text, and its logits, with hooks of this test."""
    from transformers import AutoModelForImageTextToText

    with quiet(bars=False):
        whole: Any = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype).eval()
    decoder: Any = next(m for n, m in whole.named_modules() if n.endswith(("language_model", "text_model")))
    layers: Any = next(m for n, m in decoder.named_modules() if n.endswith("layers") and isinstance(m, nn.ModuleList))
    seen: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda m, a, out, n=number: seen.update({f"resid.{n}": out[0] if isinstance(out, tuple) else out})
        )
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, n=number: seen.update({f"attn.{n}": a[0]}))
    with torch.no_grad():
        logits = whole(input_ids=tokens, use_cache=False).logits
    return seen, logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_text_decoder_gives_the_bits_of_the_whole_model(multimodal: Path, dtype: str) -> None:
    tokens = torch.randint(4, 990, (2, 16), generator=torch.Generator().manual_seed(0))
    expected, logits = activations_of_the_whole_model(multimodal, tokens, getattr(torch, dtype))
    lm = load_lm(str(multimodal), dtype=dtype)
    sites = resolve(load_meta(str(multimodal)), list(expected))
    found = capture(lm, sites, tokens)
    for name, value in expected.items():
        assert torch.equal(found[name], value.reshape(found[name].shape)), name
    assert torch.equal(lm.model(input_ids=tokens).logits, logits)
    assert {p.dtype for p in lm.model.parameters()} == {getattr(torch, dtype)}


def test_nothing_of_the_towers_is_left(multimodal: Path) -> None:
    lm, meta = load_lm(str(multimodal)), load_meta(str(multimodal))
    words = ("vision", "visual", "projector", "connector", "image_proj")
    assert not [name for name, _ in lm.model.named_parameters() if any(word in name for word in words)]
    assert [n for n, _ in lm.model.named_parameters()] == [n for n, _ in meta.named_parameters()]
    assert {site.d_in for site in offered(meta)} == {32}
    assert all(".layers." in site.module and "vis" not in site.module for site in offered(meta))


def test_a_harvest_and_its_evaluation(multimodal: Path, tmp_path: Path) -> None:
    known: dict[str, Any] = {"model": str(multimodal), "dataset": "builtin:pydoc", "sites": ("resid.1",), "rows": 300}
    known |= {"context_size": 64, "window_rows": 256, "heldout": 0.02, "device": "cpu", "dtype": "auto"}
    store = harvest(HarvestConfig(**known), tmp_path / "store")
    assert store is not None
    assert (store.plan.schema_version, store.plan.model.dtype) == ("1.0", "bfloat16")
    lm = load_planned(store.plan.model, str(multimodal))
    tokens = torch.randint(4, 990, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(effects(lm, store.plan.sites[0], tokens)[0]).all()
    done = gsae("sites", multimodal)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=mostly_slow(WITHIN, "git"))
def within(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with a random model of which one class holds everything, named after its family."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[request.param](**TEXT, **WITHIN[request.param][0])
    place = tmp_path_factory.mktemp("within") / str(request.param)
    return save_random(AutoModelForCausalLM, config, tiny_tokenizer, place)


def test_towers_in_the_class_of_the_text_decoder_are_dropped(within: Path) -> None:
    from transformers import AutoModelForCausalLM

    lm = load_lm(str(within), dtype="bfloat16")
    for model in (lm.model, load_meta(str(within))):
        assert {path for path, module in model.named_modules() if isinstance(module, Dropped)} == WITHIN[within.name][1]
    with quiet(bars=False):
        whole: Any = AutoModelForCausalLM.from_pretrained(within, dtype=torch.bfloat16).eval()
    tokens = torch.randint(4, 990, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(lm.model(input_ids=tokens).logits, whole(input_ids=tokens).logits)


@pytest.mark.slow
def test_a_store_is_that_of_the_model_with_its_towers(
    within: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = HarvestConfig(
        model=str(within), dataset="builtin:pydoc", sites=("resid.0", "resid.2"), rows=300, context_size=64,
        window_rows=256, heldout=0.02, device="cpu",
    )  # fmt: skip
    harvest(config, tmp_path / "store")
    monkeypatch.setattr(loading, "drop_towers", lambda model: model)
    monkeypatch.setattr(random_instance, "drop_towers", lambda model: model)
    assert not any(isinstance(module, Dropped) for module in load_lm(str(within)).model.modules())
    harvest(config, tmp_path / "whole")
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_a_part_that_holds_the_embeddings_is_kept_whatever_it_takes() -> None:
    model = tiny_model("git")
    model.git.input_modalities = model.git.embeddings.input_modalities = "image"
    drop_towers(model)
    assert [path for path, module in model.named_modules() if isinstance(module, Dropped)] == ["git.image_encoder"]


def test_a_part_that_text_needs_is_named_when_it_was_dropped() -> None:
    with pytest.raises(UsageError, match=r"runs its model\.vision_tower for text too"):
        Dropped("model.vision_tower")(torch.ones(1))


@pytest.mark.parametrize("kind", ["paligemma", "pi0"])
def test_a_model_with_attention_in_both_directions_is_refused(kind: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING[kind]().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    refused(2, "'model' cannot be loaded: its tokens attend to later ones", "sites", tmp_path / "model")


def test_a_text_model_loses_nothing(tiny_llama: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, BartConfig

    assert auto_class(AutoConfig.from_pretrained(tiny_llama), False) is AutoModelForCausalLM
    assert auto_class(BartConfig(), False) is AutoModelForCausalLM
    model = load_meta(str(tiny_llama))
    names = [name for name, _ in model.named_modules()]
    assert [name for name, _ in drop_towers(model).named_modules()] == names
    assert not any(isinstance(module, Dropped) for module in model.modules())


def test_no_row_depends_on_later_tokens(multimodal: Path) -> None:
    lm = load_lm(str(multimodal), dtype="float32")
    tokens = torch.randint(4, 990, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, -1] = 991 - changed[0, -1]
    sites = resolve(lm.model, ["resid.2"])
    before, after = (capture(lm, sites, each)["resid.2"][0] for each in (tokens, changed))
    assert torch.allclose(before[:-1], after[:-1], atol=1e-5)
    assert not torch.allclose(before[-1], after[-1], atol=1e-2)
