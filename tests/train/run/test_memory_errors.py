"""Running out of memory in training is one line; other errors stay what they are."""

from pathlib import Path

import pytest
import torch

from gsae.errors import SpaceError
from gsae.store import Store
from gsae.tests.support.children import files
from gsae.tests.support.command import refused
from gsae.tests.support.small_runs import config, run
from gsae.train import parse_sae
from gsae.train.run import checkpoint_writer
from gsae.train.run.group import Group
from gsae.train.run.memory_errors import memory_errors

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to "
                   "allocate 4096 bytes. Error code 12 (Cannot allocate memory)")  # fmt: skip
PINNED = RuntimeError("CUDA error: out of memory")
SAES = parse_sae("gated width=48 l1=.1,.3,.5")


@pytest.mark.parametrize(
    ("error", "device", "said"),
    [
        (CUDA, "cuda", "Out of memory on cuda at a request for 2.50 GiB more, while training a group of 3 SAEs (gated"),
        (CPU, "cpu", "Out of memory on the host at a request for 4096 bytes more, while training a group of 3 SAEs"),
        (CPU, "cuda", "Out of memory on the host at a request for 4096 bytes more"),
        (PINNED, "cuda", "Out of memory on cuda, while training"),
        (MemoryError(), "cuda", "Out of memory on the host, while training"),
    ],
)
def test_an_error_of_memory_says_how_much_was_asked_where_and_what_to_change(
    error: Exception, device: str, said: str
) -> None:
    settings = config(saes=SAES, device=device).resolved(device=device, threads=1)
    with pytest.raises(SpaceError) as caught, memory_errors(settings, settings.groups()):
        raise error
    message = str(caught.value)
    assert message.startswith(said)
    assert "fewer SAEs a group (--stack 1), a smaller --batch-size, or --precision bfloat16" in message
    assert "begin in another folder" in message
    assert "\n" not in message


def test_other_errors_pass() -> None:
    settings = config().resolved(device="cpu", threads=1)
    with pytest.raises(RuntimeError, match="shapes"), memory_errors(settings, settings.groups()):
        raise RuntimeError("shapes do not match")


def fail(error: Exception, at: int) -> type:
    """A method of `Group` that raises an error at some step."""

    class Failing(Group):
        def advance(self, *arguments: object) -> None:
            if self.step == at:
                raise error
            super().advance(*arguments)  # type: ignore[arg-type]

    return Failing


@pytest.mark.slow
def test_the_command_ends_in_one_line_with_its_exit_code_and_goes_on_later(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_store, tmp_path / "whole", checkpoint_every=4)
    monkeypatch.setattr("gsae.train.run.trainer.Group", fail(CUDA, 10))
    command = ["train", tiny_store.path, "--site", "mlp.1", "--steps", 30, "--batch-size", 96, "--log-every", 7,
               "--threads", 1, "--checkpoint-every", 4, "--out", tmp_path / "run", "--sae", "gated width=48 l1=.1,.3",
               "--sae", "relu width=40 l1=.1", "--sae", "gated width=16 l1=.2"]  # fmt: skip
    refused(6, "2.50 GiB more, while training 4 SAEs in 3 groups. Train with fewer SAEs in a run, a smaller", *command)
    monkeypatch.undo()
    run(tiny_store, tmp_path / "run", checkpoint_every=4)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


@pytest.mark.slow
def test_memory_that_the_writer_of_checkpoints_lacks_is_the_hosts(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: Path, checkpoint: object) -> None:
        raise MemoryError

    monkeypatch.setattr(checkpoint_writer, "writes_behind", lambda device: True)
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", fails)
    with pytest.raises(SpaceError, match="Out of memory on the host, while training"):
        run(tiny_store, tmp_path / "run", checkpoint_every=4)
