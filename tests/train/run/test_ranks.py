"""Several processes take the groups of a run from a queue; the bytes are those of one process alone."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gsae.errors import IncompatibleError, InterruptedRun, UsageError
from gsae.store import Store, all_cores, open_store
from gsae.tests.support.children import files, start
from gsae.train import Event, Finished, Left, Progress, Ranks, RunConfig, Started, parse_sae, read_config, train
from gsae.train.run.fitting import fitted
from gsae.train.run.folder import claim_group
from gsae.train.run.metrics_files import group_folder

SAES = parse_sae("gated width=24 l1=.1,.2,.3") + parse_sae("relu width=16 l1=.1,.2") + parse_sae("gated width=8 l1=.1")


def config(**settings: Any) -> RunConfig:
    usual = {"site": "mlp.1", "steps": 40, "batch_size": 64, "log_every": 4, "threads": 1, "device": "cpu",
             "checkpoint_every": 5, "eval_every": 20, "saes": SAES}  # fmt: skip
    return RunConfig(**(usual | settings))


def rank_of_four(store: Path, out: Path, rank: int, log: Path, pause: float) -> None:
    """Train as one of four ranks; write each group that it starts to `log`, and sleep after each line of metrics."""

    def listen(event: Event) -> None:
        if isinstance(event, Started):
            with log.open("a") as file:
                file.write(f"{rank} {event.step} {event.saes}\n")
        if isinstance(event, Progress):
            time.sleep(pause)

    try:
        train(open_store(store).site("mlp.1"), config(), out, listen, Ranks(rank, 4, rank, 4))
    except InterruptedRun as stop:
        raise SystemExit(stop.exit_code) from None


@pytest.mark.kill
def test_four_ranks_train_every_group_once_to_the_bytes_of_one_process(tiny_store: Store, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    ranks = [start(rank_of_four, tiny_store.path, out, rank, log, 0.02) for rank in range(4)]
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4
    begun = [line.split(" ", 2) for line in log.read_text().splitlines()]
    assert len(begun) == len({saes for _, _, saes in begun}) == 4  # 3 + 2 + 1 SAEs in stacks of at most 2
    assert read_config(out).stack == 2
    left = files(out)
    other = tmp_path / "one"
    train(tiny_store.site("mlp.1"), config(stack=2), other)
    assert left == files(other)


@pytest.mark.kill
def test_four_ranks_stopped_and_killed_are_finished_by_one_process_to_the_same_bytes(
    tiny_store: Store, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    ranks = [start(rank_of_four, tiny_store.path, out, rank, log, 0.5) for rank in range(4)]
    while len(list(out.glob("state/*/checkpoint.safetensors"))) < 4 and any(rank.is_alive() for rank in ranks):
        time.sleep(0.01)
    for rank, number in zip(ranks, (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL), strict=True):
        os.kill(rank.pid or 0, number)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [143, -signal.SIGKILL, 143, -signal.SIGKILL]
    events: list[Event] = []
    train(tiny_store.site("mlp.1"), config(), out, events.append)
    began = next(event for event in events if isinstance(event, Started))
    assert began.groups == 4
    assert 0 < began.step < 40
    assert events[-1] == Finished(40, False, ())
    train(tiny_store.site("mlp.1"), config(stack=2), tmp_path / "one")
    assert files(out) == files(tmp_path / "one")


def test_a_run_that_another_process_begins_at_the_same_moment_is_not_taken_for_another_folder(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, out, small = tiny_store.site("mlp.1"), tmp_path / "run", config(steps=2, saes=SAES[:1])

    def slower(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        train(site, small, out)
        return fitted(*arguments, **options)

    monkeypatch.setattr("gsae.train.run.folder.fitted", slower)
    events: list[Event] = []
    train(site, small, out, events.append)
    assert events == [Finished(2, True, ())]


def test_groups_at_different_steps_share_one_stream(tiny_store: Store, tmp_path: Path) -> None:
    site, out = tiny_store.site("mlp.1"), tmp_path / "run"

    class Enough(Exception):  # noqa: N818
        pass

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.step == 20:
            raise Enough

    with pytest.raises(Enough):  # one group alone comes as far as step 15
        train(site, config(stack=3), out, stop, Ranks(0, 3))
    steps: list[tuple[int, int]] = []

    def note(event: Event) -> None:
        if isinstance(event, Progress):
            steps.append((event.step, len(event.metrics)))

    train(site, config(), out, note)
    assert steps[:6] == [(4, 3), (8, 3), (12, 3), (16, 6), (20, 6), (24, 6)]
    train(site, config(stack=3), tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_a_group_that_another_process_holds_is_not_trained(tiny_store: Store, tmp_path: Path) -> None:
    site, out = tiny_store.site("mlp.1"), tmp_path / "run"
    train(site, config(steps=2, saes=SAES[:1]), tmp_path / "other")
    (out / "state").mkdir(parents=True)
    (out / "config.toml").write_bytes((tmp_path / "other/config.toml").read_bytes())
    claim = claim_group(out, 0)
    assert claim is not None
    assert claim_group(out, 0) is None
    events: list[Event] = []
    train(site, config(steps=2, saes=SAES[:1]), out, events.append, Ranks(1, 2))
    assert events == [Left(1)]
    with pytest.raises(IncompatibleError, match="Another process is training"):
        train(site, config(steps=2, saes=SAES[:1]), out)
    claim.release()
    train(site, config(steps=2, saes=SAES[:1]), out)
    assert group_folder(out, 0).exists()
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "other/metrics.jsonl").read_bytes()


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}


def test_ranks_follow_torchruns_environment_except_for_its_thread_count(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Ranks.of({}) == Ranks(0, 1, 0, 1)
    found = Ranks.of(TORCHRUN)
    assert found == Ranks(5, 8, 1, 4)
    assert found.threads == max(1, all_cores() // 4)
    assert (found.device("cuda", 8), found.device("cuda", 1), found.device("cpu", 8)) == ("cuda:1", "cuda", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train(tiny_store.site("mlp.1"), config(threads=None, steps=1), tmp_path / "run")
    assert read_config(tmp_path / "run").threads == all_cores()
    with pytest.raises(UsageError, match="does not give a rank"):
        Ranks.of(TORCHRUN | {"RANK": "five"})
    with pytest.raises(UsageError, match="ranks count from 0"):
        Ranks.of(TORCHRUN | {"RANK": "8"})


@pytest.mark.parametrize(("ranks", "groups"), [(1, 3), (3, 3), (4, 4), (5, 6), (6, 6), (9, 6)])
def test_stacks_are_as_large_as_possible_with_a_group_for_every_rank(ranks: int, groups: int) -> None:
    run = config().resolved(device="cpu", threads=1, ranks=ranks)
    assert len(run.groups()) == groups
    assert [sae.name for group in run.groups() for sae in group] == [
        "gated-w24-l1_0.1-seed0", "gated-w24-l1_0.2-seed0", "gated-w24-l1_0.3-seed0", "relu-w16-l1_0.1-seed0",
        "relu-w16-l1_0.2-seed0", "gated-w8-l1_0.1-seed0",
    ]  # fmt: skip
