"""Memory: what groups need, how they are cut and trained in parts where it is too little, and what is refused."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.errors import InterruptedRun, SpaceError
from gsae.store import Site, Store
from gsae.tests.support.children import files
from gsae.tests.support.small_runs import SAES, config, run
from gsae.train import Event, Finished, Progress, Ranks, Started, estimate, parse_sae, read_config, train
from gsae.train.run import memory
from gsae.train.run.config import ResolvedRun
from gsae.train.run.fitting import Room
from gsae.train.run.group import Group
from gsae.train.run.inputs import Inputs
from gsae.train.run.memory import Memory, checkpoint_bytes, group_memory, page_locked, saved_bytes
from gsae.train.run.ranks import ALONE

FOUR = parse_sae("gated width=48 l1=.1,.2,.3,.4")


def resolved(**settings: Any) -> ResolvedRun:
    return config(**settings).resolved(device="cpu", threads=1)


@pytest.fixture
def site(tiny_store: Store) -> Site:
    return tiny_store.site("mlp.1")


class Limit:
    """Sets what is available, on each device, to what some groups need with their rows, and no byte more."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site, self.monkeypatch = site, monkeypatch

    def bytes(self, size: int) -> None:
        self.monkeypatch.setattr(memory, "available_bytes", lambda device: size)

    def groups(self, numbers: list[int], **settings: Any) -> None:
        self.bytes(Room.of(self.site, resolved(device="cpu", **settings)).need(numbers).device)


@pytest.fixture
def limit(site: Site, monkeypatch: pytest.MonkeyPatch) -> Limit:
    return Limit(site, monkeypatch)


def stop(event: Event) -> None:
    if isinstance(event, Progress) and event.step == 14:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_group_that_does_not_fit_is_cut_and_the_run_keeps_to_that(
    tiny_store: Store, tmp_path: Path, limit: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"saes": FOUR, "device": "cpu"}
    run(tiny_store, tmp_path / "expected", stack=3, **own)  # two and two
    limit.groups([0], stack=2, saes=FOUR)
    with pytest.raises(InterruptedRun):
        train(tiny_store.site("mlp.1"), config(**own), tmp_path / "run", stop)
    assert [len(saes) for saes in read_config(tmp_path / "run").groups()] == [2, 2]
    monkeypatch.undo()  # the run goes on where there is memory for all four
    begun = [event for event in run(tiny_store, tmp_path / "run", **own) if isinstance(event, Started)]
    assert [event.groups for event in begun] == [2]
    assert files(tmp_path / "run") == files(tmp_path / "expected")


@pytest.mark.slow
def test_groups_that_do_not_fit_beside_one_another_are_trained_in_parts_to_the_same_bytes(
    tiny_store: Store, tmp_path: Path, limit: Limit
) -> None:
    run(tiny_store, tmp_path / "together", device="cpu")
    limit.groups([0])
    events = run(tiny_store, tmp_path / "parts", device="cpu")
    begun = [(event.groups, event.later) for event in events if isinstance(event, Started)]
    assert begun == [(1, 2), (2, 0)]  # the two smaller ones fit together
    assert events[-1] == Finished(30, False, ())
    assert files(tmp_path / "parts") == files(tmp_path / "together")


@pytest.mark.slow
def test_a_run_that_stopped_in_its_first_part_completes(tiny_store: Store, tmp_path: Path, limit: Limit) -> None:
    run(tiny_store, tmp_path / "together", device="cpu")
    limit.groups([0])
    with pytest.raises(InterruptedRun):
        train(tiny_store.site("mlp.1"), config(device="cpu"), tmp_path / "run", stop)
    run(tiny_store, tmp_path / "run", device="cpu")
    assert files(tmp_path / "run") == files(tmp_path / "together")


def test_an_sae_that_does_not_fit_alone_and_a_stack_that_was_asked_for_are_refused(
    site: Site, tmp_path: Path, limit: Limit
) -> None:
    limit.groups([0], stack=2, saes=FOUR)
    limited = memory.available_bytes("cpu")
    with pytest.raises(SpaceError, match=r"^Training a group of 4 SAEs \(gated, 48 latents\) needs .*--stack 2\)"):
        train(site, config(saes=FOUR, stack=4, device="cpu"), tmp_path / "run")
    limit.bytes(limited // 4)
    message = r"^Training one SAE \(gated, 48 latents\) needs 0\.0 GB of memory, and 0\.0 GB .*smaller --batch-size"
    with pytest.raises(SpaceError, match=message) as refused:
        train(site, config(saes=FOUR, device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert estimate(site, config(saes=FOUR, device="cpu"))["refusal"] == str(refused.value)


@pytest.mark.slow
def test_a_run_goes_on_only_with_memory_and_is_complete_without(
    tiny_store: Store, tmp_path: Path, limit: Limit
) -> None:
    with pytest.raises(InterruptedRun):
        train(tiny_store.site("mlp.1"), config(device="cpu"), tmp_path / "run", stop)
    before = files(tmp_path / "run")
    limit.bytes(1000)
    with pytest.raises(SpaceError, match="continue it where there is more memory, or begin in another folder"):
        run(tiny_store, tmp_path / "run", device="cpu")
    assert files(tmp_path / "run") == before
    limit.bytes(10**12)
    run(tiny_store, tmp_path / "run", device="cpu")
    limit.bytes(1000)
    assert run(tiny_store, tmp_path / "run", device="cpu") == [Finished(30, True, ())]


def test_sizes_are_those_of_the_tensors(site: Site) -> None:
    settings = resolved(saes=parse_sae("gated width=500 l1=.1,.2"))
    (saes,) = settings.groups()
    group = Group(0, saes, settings, Inputs.of(site, settings))
    tensors = group.checkpoint(0).tensors
    held = sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint_bytes(saes, site.d_in, settings) == pytest.approx(held, rel=0.01)
    saved = sum(tensor.nbytes for tensor in vars(group.bank.one(0)).values())
    assert saved_bytes(saes[0], site.d_in) == saved
    on_cpu = group_memory(saes, site.d_in, settings)
    assert on_cpu.host == 0
    assert on_cpu.device > held
    on_gpu = group_memory(saes, site.d_in, settings.model_copy(update={"device": "cuda"}))
    kept = {name: tensor.nbytes for name, tensor in tensors.items() if name.startswith("divergence.healthy.")}
    copied = sum(page_locked(t.nbytes) for name, t in tensors.items() if not name.startswith("divergence."))
    assert on_gpu.host == pytest.approx(2 * sum(kept.values()) + copied, rel=0.01)
    assert on_gpu.device == on_cpu.device - sum(kept.values()) + tensors["bank.b_dec.second_moment"].nbytes


def test_page_locked_memory_is_rounded_up_to_a_power_of_two() -> None:
    assert [page_locked(size) for size in (1, 2, 3, 1024, 1025)] == [1, 2, 4, 1024, 2048]


def test_ranks_that_share_a_device_need_a_group_each_and_ranks_with_a_gpu_each_one_of_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    sizes = {"cpu": 10**12, "cuda": 10**12}
    monkeypatch.setattr(memory, "available_bytes", sizes.__getitem__)
    ranks = Ranks(0, 4, 0, 4)
    on_cpu, on_gpu = (
        Room.of(site, config(device=device, saes=FOUR, stack=1).resolved(device=device, threads=1))
        for device in ("cpu", "cuda")
    )
    assert on_cpu.needed(ranks) == Memory(4 * on_cpu.need([0]).device)
    assert on_gpu.needed(ranks) == Memory(on_gpu.need([0]).device, 4 * on_gpu.need([0]).host)
    assert on_gpu.needed(ALONE).device == on_gpu.need([0, 1, 2, 3]).device
    sizes["cpu"] = 1000
    short = Room.of(site, on_gpu.run)
    assert "GB are available (host)" in str(short.refusal(ranks))
    assert "in each of the 4 ranks on this machine needs" in str(short.refusal(ranks))


def test_a_dry_run_lists_groups_parts_and_sizes(site: Site, limit: Limit) -> None:
    limit.groups([0])
    planned = estimate(site, config(device="cpu"))
    assert [(one["architecture"], one["d_sae"], one["saes"], one["training"]) for one in planned["groups"]] == [
        ("gated", 48, 2, 1), ("relu", 40, 1, 2), ("gated", 16, 1, 2),
    ]  # fmt: skip
    assert (planned["saes"], planned["stack"], planned["trainings"]) == (len(SAES), len(SAES), 2)
    assert planned["memory_bytes"] == planned["available_bytes"]
    assert planned["host_memory_bytes"] is None
    assert planned["refusal"] is None
    assert planned["checkpoint_bytes"] == sum(one["checkpoint_bytes"] for one in planned["groups"])
    assert planned["saved_bytes"] == 4 * sum(planned["parameters"].values())
