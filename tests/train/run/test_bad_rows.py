"""Rows, settings and sizes that cannot be trained: refused with a reason, or left out when asked."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from gsae.errors import SpaceError, UsageError
from gsae.store import Site, Store
from gsae.tests.support.command import gsae, refused
from gsae.tests.support.selection import mostly_slow
from gsae.tests.support.stores import make_store, normal_rows
from gsae.train import Event, RunConfig, Started, estimate, parse_sae, train
from gsae.train.run import memory


def config(**settings: Any) -> RunConfig:
    usual = {"site": "mlp.1", "steps": 60, "batch_size": 64, "threads": 1, "device": "cpu", "max_norm_multiple": 0}
    return RunConfig(**(usual | settings), saes=parse_sae("gated width=24 l1=.1") + parse_sae("relu width=24 l1=.1"))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def with_bad(rows: int, d_in: int, every: int) -> NDArray[Any]:
    x = normal_rows(rows, d_in)
    x[::every, 3] = ml_dtypes.bfloat16(np.nan)
    x[every // 2 :: every, 5] = ml_dtypes.bfloat16(np.inf)
    return x


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_store(tmp_path_factory.mktemp("bad") / "store", rows=partial(with_bad, every=200)).site("mlp.1")


@pytest.mark.parametrize("max_norm_multiple", [0, 10])
def test_rows_that_are_not_finite_are_counted_and_the_first_is_named(
    bad: Site, tmp_path: Path, max_norm_multiple: float
) -> None:
    found = np.flatnonzero(~np.isfinite(bad[:].float().numpy()).all(1))
    source = int(bad.sources(found[:1])[0])
    with pytest.raises(UsageError) as caught:
        train(bad, config(max_norm_multiple=max_norm_multiple), tmp_path / "run")
    window = found[0] // 1024
    assert str(caught.value) == (
        f"{len(found)} rows of site 'mlp.1' have a NaN or an infinity, the first row {found[0]} in "
        f"train/mlp.1/c/{window}/0, which is position {source % 32} of context {source // 32}. "
        "Leave them out with --skip-nonfinite."
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("max_norm_multiple", [0, 10])
def test_with_skip_nonfinite_rows_that_are_not_finite_are_left_out_and_counted(
    bad: Site, tmp_path: Path, max_norm_multiple: float
) -> None:
    events: list[Event] = []
    settings = config(skip_nonfinite=True, max_norm_multiple=max_norm_multiple)
    train(bad, settings, tmp_path / "run", events.append)
    (begun,) = [event for event in events if isinstance(event, Started)]
    assert begun.rows_nonfinite == bad.moments.non_finite > 10
    assert begun.rows == bad.rows - begun.rows_skipped
    assert all(np.isfinite(line["loss"]) and line["heldout"]["rows"] < 700 for line in lines(tmp_path / "run")[-2:])


def test_the_command_refuses_rows_that_are_not_finite_in_one_line(bad: Site, tmp_path: Path) -> None:
    known = ["train", bad.store.locations[0], "--site", "mlp.1", "--steps", 3, "--out", tmp_path / "run"]
    refused(2, "--skip-nonfinite", *known, "--sae", "gated width=8 l1=.1")
    assert not (tmp_path / "run").exists()


def test_wrong_options_are_refused_in_one_line(tiny_store: Store, tmp_path: Path) -> None:
    known = ["train", tiny_store.path, "--site", "mlp.1", "--steps", 3, "--out", tmp_path / "run"]
    often = gsae(*known, "--sae", "gated width=8 l1=.1", "--resample-at", "often")
    assert often.returncode == 2
    assert "'--resample-at': got 'often'; give numbers or ranges, for instance 0-3,9." in often.stderr
    refused(2, "relu has no variants", *known, "--sae", "relu width=8 l1=.1 variant=untied")
    refused(2, "set init to the folder of one", *known, "--sae", "rescale-shift width=8")


def constant(rows: int, d_in: int, channels: int) -> NDArray[Any]:
    x = normal_rows(rows, d_in)
    x[:, :channels] = ml_dtypes.bfloat16(3.0)
    return x


@pytest.mark.parametrize("channels", mostly_slow([1, 32], 1))
def test_constant_channels_even_all_of_them_train_to_finite_figures(tmp_path: Path, channels: int) -> None:
    store = make_store(tmp_path / "store", rows=partial(constant, channels=channels))
    train(store.site("mlp.1"), config(), tmp_path / "run")
    for line in lines(tmp_path / "run")[-2:]:
        assert np.isfinite(line["loss"])
        assert (line["explained_variance"] is None) == (channels == 32)


def test_rows_of_zeros_alone_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", rows=lambda rows, d_in: np.zeros((rows, d_in), ml_dtypes.bfloat16))
    with pytest.raises(UsageError, match="no rows to train on, or only rows of zeros"):
        train(store.site("mlp.1"), config(), tmp_path / "run")


def test_a_run_that_needs_more_memory_than_available_is_refused_before_it_starts(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tiny_store.site("mlp.1")
    wide = RunConfig(site="mlp.1", steps=5, device="cpu", saes=parse_sae("gated width=1000000000 l1=.1"))
    with pytest.raises(SpaceError, match=r"needs \d+\.\d GB of memory, and \d+\.\d GB are available \(cpu\)"):
        train(site, wide, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    planned = estimate(site, wide)
    assert planned["memory_bytes"] > planned["available_bytes"]
    assert "expected_seconds" not in planned
    # Twice the weights, twice the moments and gradients of a small run, and no less than its checkpoint.
    small = estimate(site, config())
    assert small["memory_bytes"] > 2 * 4 * sum(small["parameters"].values())
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(SpaceError, match=r"0\.0 GB are available"):
        train(site, config(), tmp_path / "run")


def test_a_dry_run_measures_steps_and_reports_what_they_need(tiny_store: Store) -> None:
    planned = estimate(tiny_store.site("mlp.1"), config())
    assert planned["expected_seconds"] > 0
    assert planned["read_bytes_per_second_needed"] > 0
    assert planned["flops"] == 60 * planned["flops_per_step"] == 60 * 2 * (7 + 5) * 64 * 24 * 32
    assert planned["parameters"] == {
        "gated-w24-l1_0.1-seed0": 2 * 24 * 32 + 3 * 24 + 32,
        "relu-w24-l1_0.1-seed0": 2 * 24 * 32 + 24 + 32,
    }
