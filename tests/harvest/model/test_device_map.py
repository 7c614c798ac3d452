"""A model spread over devices: here the CPU and the disk, which accelerate handles in the same way as GPUs."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.errors import IncompatibleError, UsageError
from gsae.harvest import HarvestConfig, capture, effects, harvest, load_lm, load_planned, resolve
from gsae.tests.support.children import files

SITES = ["mlp.0", "attn.1", "resid.1", "mlp.2"]
SPREAD = json.dumps(
    {
        "model.embed_tokens": "disk",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
)


@pytest.mark.parametrize("device_map", ["auto", '{"": "cpu"}', SPREAD], ids=["auto", "one", "cpu and disk"])
def test_a_spread_model_gives_the_same_bits_pass_after_pass(tiny_llama: Path, device_map: str) -> None:
    plain, spread = load_lm(str(tiny_llama)), load_lm(str(tiny_llama), device_map=device_map)
    assert spread.device == torch.device("cpu")
    assert spread.provenance.device_map == device_map
    assert spread.provenance.accelerator == plain.provenance.accelerator
    sites = resolve(plain.model, SITES)
    for seed in range(3):  # a pass that ends early leaves weights where they were brought
        tokens = torch.randint(4, 1024, (3, 24), generator=torch.Generator().manual_seed(seed))
        found, expected = capture(spread, sites, tokens), capture(plain, sites, tokens)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(effects(spread, sites[0], tokens)[0], effects(plain, sites[0], tokens)[0])


def test_weights_offloaded_to_disk_are_removed_with_the_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lm = load_lm(str(tiny_llama), device_map=SPREAD)
    assert any(p.is_meta for p in lm.model.parameters())
    assert [p.name.startswith("gsae-weights-") for p in tmp_path.iterdir()] == [True]
    del lm
    import gc

    gc.collect()
    assert not list(tmp_path.iterdir())


def test_the_plan_records_the_device_map(tiny_llama: Path, tmp_path: Path) -> None:
    known: dict[str, Any] = {"model": str(tiny_llama), "dataset": "builtin:pydoc", "sites": ("mlp.1",), "rows": 600}
    known |= {"context_size": 64, "window_rows": 512, "heldout": 0.02}
    store = harvest(HarvestConfig(**known, device_map="auto"), tmp_path / "spread")
    plain = harvest(HarvestConfig(**known), tmp_path / "plain")
    assert store is not None
    assert plain is not None
    assert store.plan.model.device_map == "auto"
    assert "device_map" not in plain.plan.model.model_dump()
    rows, expected = files(store.path / "train"), files(plain.path / "train")
    assert rows == expected
    with pytest.raises(IncompatibleError, match=r"model\.device_map was 'auto', now None"):
        harvest(HarvestConfig(**known), store.path)
    assert load_planned(store.plan.model, str(tiny_llama), "auto").provenance.device_map == "auto"
    assert load_planned(store.plan.model, str(tiny_llama), "cpu").provenance.device_map is None


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ("everywhere", "Device map 'everywhere': give auto, "),
        ("[1]", "a JSON object of devices"),
        ("{}", "a JSON object of devices"),
        ('{"": "cuda:77"}', "Device 'cuda:77' cannot be used"),
    ],
)
def test_a_device_map_that_cannot_be_used_is_refused(tiny_llama: Path, device_map: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        load_lm(str(tiny_llama), device_map=device_map)
    assert "\n" not in str(caught.value)
