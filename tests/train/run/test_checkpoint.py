"""Checkpoints: they come back as they were, damaged ones are refused, and a failed write changes nothing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gsae.errors import CorruptError, SpaceError
from gsae.files import replace_file
from gsae.train.run.checkpoint import CHECKPOINT, Checkpoint, load_checkpoint, save_checkpoint


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    tensors = {"a": torch.tensor([1.5, float("nan"), -0.0]), "b": torch.arange(6).view(2, 3)}
    save_checkpoint(tmp_path, Checkpoint(7, {"epoch": 1, "offset": 2}, "d" * 64, 99, tensors))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.reader, found.digest) == (7, {"epoch": 1, "offset": 2}, "d" * 64)
    assert found.metrics_bytes == 99
    assert {n: t.numpy().tobytes() for n, t in found.tensors.items()} == {
        n: t.numpy().tobytes() for n, t in tensors.items()
    }
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_a_damaged_checkpoint_is_corrupt(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, Checkpoint(7, {}, "d" * 64, 0, {"a": torch.zeros(100)}))
    path = tmp_path / CHECKPOINT
    if damage == "foreign":
        save_file({"a": torch.zeros(3)}, path)
    else:
        path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else b"")
    with pytest.raises(CorruptError, match="not a checkpoint of gsae, or is damaged"):
        load_checkpoint(tmp_path)


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, lambda p: p.write_text("first"))

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SpaceError, match="No space left to write"):
        replace_file(path, full)
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
