"""The thread that writes checkpoints: what it writes, when, and what becomes of its errors."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.errors import SpaceError
from gsae.store import Store
from gsae.tests.support.children import files
from gsae.tests.support.small_runs import run
from gsae.train import Checkpointed, Progress
from gsae.train.run import checkpoint_writer
from gsae.train.run.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gsae.train.run.checkpoint_writer import CheckpointWriter, Unsaved

CPU = torch.device("cpu")


@pytest.fixture
def _behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while a checkpoint is written, as on a GPU."""
    monkeypatch.setattr(checkpoint_writer, "writes_behind", lambda device: True)


@contextmanager
def unsaved(folder: Path, tensor: torch.Tensor) -> Iterator[Unsaved]:
    """A checkpoint of one tensor that names five bytes of metrics."""
    with (folder / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b"line\n")
        metrics.flush()
        yield Unsaved(folder, metrics, Checkpoint(3, {}, "d" * 64, 5, {"w": tensor}))


def saved(folder: Path) -> list[float]:
    found = load_checkpoint(folder)
    assert found is not None
    return found.tensors["w"].tolist()


@pytest.mark.usefixtures("_behind")
def test_what_is_written_behind_is_the_state_at_the_step_whatever_training_does_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, given = threading.Event(), []

    def held(folder: Path, checkpoint: Checkpoint) -> None:
        given.append(checkpoint.tensors["w"].data_ptr())
        go.wait(30)
        save_checkpoint(folder, checkpoint)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", held)
    weights = torch.tensor([1.0, 2.0])
    with unsaved(tmp_path, weights) as one, CheckpointWriter(CPU) as writer:
        writer.begin(3, [one])
        weights += 10
        assert writer.written(wait=False) is None
        assert load_checkpoint(tmp_path) is None
        go.set()
        assert writer.written(wait=True) == 3
        assert writer.written(wait=True) is None
        assert saved(tmp_path) == [1.0, 2.0]
        writer.begin(4, [one])
        assert writer.written(wait=True) == 4
    assert saved(tmp_path) == [11.0, 12.0]
    assert given[0] == given[1] != weights.data_ptr()  # the memory of the copy is kept


def test_on_a_cpu_the_loop_waits_and_nothing_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def noted(folder: Path, checkpoint: Checkpoint) -> None:
        given.append(checkpoint.tensors["w"].data_ptr())
        time.sleep(0.05)
        save_checkpoint(folder, checkpoint)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", noted)
    weights = torch.tensor([1.0, 2.0])
    with unsaved(tmp_path, weights) as one, CheckpointWriter(CPU) as writer:
        writer.begin(3, [one])
        assert saved(tmp_path) == [1.0, 2.0]
        assert writer.written(wait=False) == 3
    assert given == [weights.data_ptr()]


def test_the_metrics_that_a_checkpoint_names_are_on_disk_before_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        order.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        order.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    with unsaved(tmp_path, torch.zeros(2)) as one, CheckpointWriter(CPU) as writer:
        writer.begin(3, [one])
    assert order.index("metrics.jsonl") < order.index("rename to checkpoint.safetensors")


@pytest.mark.usefixtures("_behind")
def test_the_end_of_a_writer_waits_for_its_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", Disk(seconds=0.1))
    with suppress(KeyError), unsaved(tmp_path, torch.ones(1)) as one, CheckpointWriter(CPU) as writer:
        writer.begin(3, [one])
        raise KeyError  # of the loop
    assert saved(tmp_path) == [1.0]


class Disk:
    """A disk that is slow, and full at the checkpoint of some step."""

    def __init__(self, full_at: int = -1, seconds: float = 0.02) -> None:
        self.full_at, self.seconds = full_at, seconds

    def __call__(self, folder: Path, checkpoint: Checkpoint) -> None:
        time.sleep(self.seconds)
        if checkpoint.step == self.full_at:
            raise SpaceError("No space left to write the checkpoint.")
        save_checkpoint(folder, checkpoint)


@pytest.mark.slow
@pytest.mark.usefixtures("_behind")
def test_a_run_that_is_saved_behind_every_step_on_a_slow_disk_ends_in_the_same_files(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"checkpoint_every": 1, "log_every": 1}
    monkeypatch.setattr(checkpoint_writer, "writes_behind", lambda device: False)
    run(tiny_store, tmp_path / "waiting", **settings)
    monkeypatch.setattr(checkpoint_writer, "writes_behind", lambda device: True)
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", Disk())
    events = run(tiny_store, tmp_path / "behind", **settings)
    assert files(tmp_path / "behind") == files(tmp_path / "waiting")
    shown = [event.step for event in events if isinstance(event, Checkpointed | Progress)]
    assert [event.step for event in events if isinstance(event, Checkpointed)] == list(range(1, 31))
    assert shown != sorted(shown)  # steps were taken while checkpoints were written


@pytest.mark.slow
@pytest.mark.parametrize("behind", [False, True])
def test_a_full_disk_ends_the_run_at_the_next_step_and_the_same_command_completes(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: bool
) -> None:
    settings: dict[str, Any] = {"checkpoint_every": 5, "steps": 60, "log_every": 20}
    run(tiny_store, tmp_path / "whole", **settings)
    monkeypatch.setattr(checkpoint_writer, "writes_behind", lambda device: behind)
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", Disk(full_at=10, seconds=0))
    with pytest.raises(SpaceError, match="No space left to write the checkpoint"):
        run(tiny_store, tmp_path / "run", **settings)
    found = load_checkpoint(tmp_path / "run" / "state" / "0")
    assert found is not None
    assert found.step == 5
    assert "saes" not in {path.name for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", save_checkpoint)
    run(tiny_store, tmp_path / "run", **settings)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
