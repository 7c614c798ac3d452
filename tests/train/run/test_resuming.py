"""A run that goes on elsewhere, or in another version: what it says, what it keeps to, what it refuses."""

import os
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.errors import IncompatibleError, InterruptedRun, UsageError
from gsae.store import Store
from gsae.tests.support.children import files
from gsae.tests.support.small_runs import config, run
from gsae.train import Checkpointed, Event, Finished, Moved, Progress, parse_sae, train
from gsae.train.run import machine

pytestmark = pytest.mark.slow


def stop(event: Event) -> None:
    """Stop the run after its first line."""
    if isinstance(event, Progress) and event.step == 7:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_goes_on_elsewhere_says_so_and_records_it_and_same_hardware_refuses(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InterruptedRun):
        train(tiny_store.site("mlp.1"), config(), tmp_path / "run", stop)
    here = machine.machine_for("cpu")
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["machine"] == [here]
    assert here["torch"] == torch.__version__
    assert "AVX" in here["processor"] or "CPU" in here["processor"]
    elsewhere = here | {"torch": "9.9", "processor": "NVIDIA H100"}
    monkeypatch.setattr("gsae.train.run.folder.machine_for", lambda device: elsewhere)
    before = files(tmp_path / "run")
    with pytest.raises(IncompatibleError, match=r"torch was .*, is 9\.9, processor was .* is NVIDIA.*--same-hardw"):
        run(tiny_store, tmp_path / "run", same_hardware=True)
    assert files(tmp_path / "run") == before
    moved = [event.changed for event in run(tiny_store, tmp_path / "run") if isinstance(event, Moved)]
    assert len(moved) == 1
    assert "is 9.9" in moved[0]
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["machine"] == [here, elsewhere]
    monkeypatch.undo()
    assert run(tiny_store, tmp_path / "run") == [Finished(step=30, already=True, stopped=())]  # nothing is trained here


def test_a_run_on_a_gpu_that_is_not_there_is_refused_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="computes on 'cuda', and torch finds no GPU here"):
        machine.machine_for("cuda")


def test_a_run_that_an_older_version_began_goes_on_with_its_own_start_steps_and_rates(
    tiny_store: Store, tmp_path: Path
) -> None:
    own = {"row_clip": False, "encoder_start": "unit", "adam_eps": 1e-8, "lr": 1e-3, "lr_warm_up_steps": 5,
           "resample_norm_multiple": 0.0, "on_divergence": "continue", "resample_at": (12,),
           "saes": parse_sae("gated width=160 l1=.3")}  # fmt: skip
    run(tiny_store, tmp_path / "whole", **own)

    with pytest.raises(InterruptedRun):
        train(tiny_store.site("mlp.1"), config(**own), tmp_path / "run", stop)
    path = tmp_path / "run" / "config.toml"
    new = ("row_clip", "encoder_start", "resample_norm_multiple", "on_divergence", "healthy_every", "same_hardware",
           "gsae = ", "torch = ", "numba = ", "processor = ", "[[machine]]")  # fmt: skip
    older = [line for line in path.read_text().splitlines(keepends=True) if not line.startswith(new)]
    assert len(older) == len(path.read_text().splitlines()) - len(new)
    path.write_text("".join(older))
    open_settings = {"resample_at": (12,), "saes": own["saes"]}  # what an older command line gave
    run(tiny_store, tmp_path / "run", **open_settings)
    left, expected = files(tmp_path / "run"), files(tmp_path / "whole")
    del left["config.toml"], expected["config.toml"]
    assert left == expected
    with pytest.raises(IncompatibleError, match="row_clip was False, now True"):
        run(tiny_store, tmp_path / "run", **open_settings, row_clip=True)


def saved_at(store: Store, out: Path, **settings: Any) -> list[int]:
    """The steps after which a run, or the rest of one, is saved."""
    return [event.step for event in run(store, out, **settings) if isinstance(event, Checkpointed)]


def test_a_run_is_saved_by_time_and_by_steps_only_where_that_is_asked_or_was_when_it_began(
    tiny_store: Store, tmp_path: Path
) -> None:
    assert saved_at(tiny_store, tmp_path / "usual", steps=2001) == [2001]  # an older default saved every 1,000 steps
    assert saved_at(tiny_store, tmp_path / "often", checkpoint_minutes=1e-9) == list(range(1, 31))
    for more, expected in (({}, [10, 20, 30]), ({"checkpoint_every": 0}, [30])):
        out = tmp_path / f"begun-{len(more)}"
        with pytest.raises(InterruptedRun):
            train(tiny_store.site("mlp.1"), config(checkpoint_every=10), out, stop)
        assert saved_at(tiny_store, out, **more) == expected
