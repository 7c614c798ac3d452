"""Several workers make one store: their shares, the same bytes as one worker alone, and workers that die."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gsae.errors import UsageError
from gsae.harvest import HarvestConfig, Worker, WorkerDone, harvest, worker, workers
from gsae.store import open_store, verify
from gsae.tests.support.children import files, load_batch_sensitive, start
from gsae.tests.support.command import gsae, refused


def config(model: Path) -> HarvestConfig:
    return HarvestConfig(
        model=str(model),
        dataset="builtin:pydoc",
        sites=("mlp.1", "attn.0"),
        rows=6000,
        context_size=64,
        window_rows=1024,
        batch_size=5,
        threads=1,
        seed=5,  # which holds out little text
    )


def work(model: Path, out: Path, rank: int, world_size: int, pause: float = 0.0) -> None:
    """Run a worker with a model that is sensitive to batches, slowed down so that a kill finds it at work."""
    harvest(config(model), out, lambda event: time.sleep(pause), load_batch_sensitive, Worker(rank, world_size))


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one worker alone writes."""
    out = tmp_path_factory.mktemp("alone") / "store"
    process = start(work, tiny_llama, out, 0, 1)
    process.join()
    assert process.exitcode == 0
    assert verify(open_store(out), deep=True) == []
    return files(out)


@pytest.mark.kill
@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_side_by_side_write_the_same_bytes_as_one(
    alone: dict[str, bytes], tiny_llama: Path, tmp_path: Path, world_size: int
) -> None:
    processes = [start(work, tiny_llama, tmp_path / "store", rank, world_size) for rank in range(world_size)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert files(tmp_path / "store") == alone


@pytest.mark.kill
def test_a_worker_that_is_killed_twice_completes_when_it_is_run_again(
    alone: dict[str, bytes], tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    others = [start(work, tiny_llama, out, rank, 3) for rank in (0, 2)]
    for windows in (1, 2):
        victim = start(work, tiny_llama, out, 1, 3, 0.02)
        while victim.is_alive() and len(files(out / "train") if (out / "train").exists() else {}) < 3 * windows:
            time.sleep(0.005)
        victim.kill()
        victim.join()
    for process in others:
        process.join()
        assert process.exitcode == 0
    again = start(work, tiny_llama, out, 1, 3)
    again.join()
    assert again.exitcode == 0
    assert files(out) == alone


@pytest.mark.kill
def test_a_worker_makes_only_its_own_windows_and_any_later_run_completes(
    alone: dict[str, bytes], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae.harvest.pipeline.PATIENCE_SECONDS", 0.0)
    out, events = tmp_path / "store", list[Any]()
    assert harvest(config(tiny_llama), out, events.append, load_batch_sensitive, Worker(1, 3)) is None
    (left,) = [event for event in events if isinstance(event, WorkerDone)]
    windows = sorted(Path(name).stem for name in alone if name.startswith("shards/"))
    assert {window.split("-")[0] for window in windows} == {"heldout", "train"}
    assert left.windows == len(windows[1::3])
    assert left.missing == tuple(window for number, window in enumerate(windows) if number % 3 != 1)
    assert not (out / "manifest.json").exists()
    again = harvest(config(tiny_llama), out, load=lambda c: pytest.fail("the model was loaded"), worker=Worker(1, 3))
    assert again is None
    done = start(work, tiny_llama, out, 0, 1)
    done.join()
    assert files(out) == alone


@pytest.mark.kill
def test_torchrun_with_two_processes_writes_what_one_writes(tiny_llama: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    command = ["harvest", "--model", tiny_llama, "--dataset", "builtin:pydoc", "--site", "mlp.1", "--rows", 3000]
    command += ["--context-size", 64, "--window-rows", 512, "--threads", 1, "--device", "cpu"]
    assert gsae(*command, "--out", one).returncode == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "gsae.cli",
    ]
    subprocess.run([*torchrun, *map(str, command), "--out", str(two)], check=True, capture_output=True)
    assert files(two) == files(one)
    assert gsae(*command, "--out", two).returncode == 0


def test_a_worker_lists_the_windows_that_others_have_not_made(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae.harvest.pipeline.PATIENCE_SECONDS", 0.0)
    command = ["harvest", "--model", tiny_llama, "--dataset", "builtin:pydoc", "--site", "mlp.1", "--rows", 1000]
    command += ["--context-size", 64, "--window-rows", 512, "--threads", 1, "--device", "cpu", "--out", tmp_path / "s"]
    done = gsae(*command, "--rank", 0, "--world-size", 2)
    assert done.returncode == 0, done.stderr
    assert "Worker 0 of 2 is done. Other workers still have to make heldout 1, heldout 3, heldout 5 and " in done.stdout
    refused(2, "belong together", *command, "--rank", 0)
    refused(2, "Rank 2 of 2", *command, "--rank", 2, "--world-size", 2)


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "12",
    "SLURM_ARRAY_TASK_MIN": "10",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_STEP": "2",
}
TASK = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("asked", "environment", "found"),
    [
        ((None, None), {}, Worker(0, 1)),
        ((2, 5), TORCHRUN, Worker(2, 5)),
        ((None, None), TORCHRUN, Worker(3, 8, 1)),
        ((None, None), ARRAY, Worker(1, 4)),
        ((None, None), TASK, Worker(1, 2, 1)),
        ((None, None), ARRAY | TASK, Worker(3, 8, 1)),
        ((None, None), {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Worker(0, 1)),
    ],
)
def test_torchrun_and_slurm_number_the_workers(
    asked: tuple[int | None, int | None], environment: dict[str, str], found: Worker
) -> None:
    assert worker(*asked, environment) == found


def test_an_environment_with_impossible_ranks_is_refused() -> None:
    with pytest.raises(UsageError, match="Cannot number the workers from the environment: RANK='one', WORLD_SIZE='8'"):
        worker(None, None, TORCHRUN | {"RANK": "one"})
    with pytest.raises(UsageError, match="Rank 8 of 8"):
        worker(None, None, TORCHRUN | {"RANK": "8"})


def test_every_window_has_one_worker() -> None:
    for size in range(1, 7):
        for number in range(20):
            assert [Worker(rank, size).makes(number) for rank in range(size)].count(True) == 1


def test_workers_of_one_machine_use_different_gpus() -> None:
    assert workers.device_of("cuda", Worker(5, 8, 1), 4) == "cuda:1"
    assert workers.device_of("auto", Worker(5, 8, 5), 4) == "cuda:1"
    assert workers.device_of("cuda", Worker(), 4) == "cuda"
    assert workers.device_of("cuda:3", Worker(5, 8, 1), 4) == "cuda:3"
    assert workers.device_of("auto", Worker(1, 2, 1), 0) == "auto"
