"""The steps that bench/harvest.py times are those of a harvest, and its variants change no byte."""

import sys
from pathlib import Path

import pytest

from gsae.harvest import HarvestConfig, harvest
from gsae.tests.support.children import files
from gsae.tests.support.harvest_steps import STEPS, VARIANTS, summary, timed_steps


def config(model: Path) -> HarvestConfig:
    return HarvestConfig(
        model=str(model), dataset="builtin:pydoc", sites=("resid.1", "mlp.0"), rows=1000, context_size=64,
        window_rows=512, heldout=0.01, device="cpu",
    )  # fmt: skip


def test_every_step_is_timed_and_no_variant_changes_a_byte(tiny_llama: Path, tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    store = harvest(config(tiny_llama), tmp_path / "plain")
    assert store is not None
    for name, within in VARIANTS.items():
        with within(), timed_steps() as steps:
            harvest(config(tiny_llama), tmp_path / name)
        assert files(tmp_path / name) == files(tmp_path / "plain")
        found = summary(steps)
        assert found.keys() == STEPS.keys()
        windows = len(store.manifest.windows)
        assert found["encode a window"]["calls"] == found["publish a window"]["calls"] == windows
        assert found["launch a pass"]["calls"] == found["hand over rows"]["calls"] == found["move rows"]["calls"]
        assert all(each["longest_ms"] >= each["median_ms"] > 0 for each in found.values())
    assert sys.getswitchinterval() == interval


def test_the_switch_interval_is_set_inside_alone() -> None:
    before = sys.getswitchinterval()
    with VARIANTS["switch interval"]():
        assert sys.getswitchinterval() == pytest.approx(2e-4)
    assert sys.getswitchinterval() == before
