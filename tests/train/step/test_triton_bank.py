"""A bank of Triton's steps, interpreted without a GPU: the weights of a CPU's bank, whichever steps it takes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gsae.tests.support.banks import unit_params
from gsae.tests.support.devices import TRITON_DEVICE as DEVICE
from gsae.tests.support.params import gate_of, normal
from gsae.train.architectures.base import Params
from gsae.train.run.replay import Batch, Unseen
from gsae.train.step import triton_bank
from gsae.train.step.adam import Adam
from gsae.train.step.fast_bank import FastBank
from gsae.train.step.triton_bank import TritonBank

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

D_IN, D_SAE, ROWS, BETA2 = 10, 14, 24, 0.999


def start(arch: str) -> list[Params]:
    made = [unit_params(arch, D_IN, D_SAE, seed, torch.float32) for seed in range(2)]
    for sae in made:
        gate_of(sae).sub_(1.2)
    return made


def adam_at(step: int, device: torch.device) -> Adam:
    return Adam(torch.full((2,), 2e-3, device=device), BETA2, 1e-8, step, row_clip=True)


def bank_after(arch: str, steps: int, share: float, *, burst: int = 0) -> TritonBank:
    """A bank after some steps, which were taken again where the device refused them; burst: a step with many gates."""
    centre = torch.linspace(-0.2, 0.3, D_IN)
    bank = TritonBank(start(arch), centre, torch.float32, DEVICE, sparse_share=share)
    l1 = torch.tensor([0.2, 0.4], dtype=torch.float64, device=DEVICE)

    def take(batch: Batch) -> Tensor | None:
        bank.step(batch.x, l1, adam_at(batch.step, DEVICE))
        return bank.went

    unseen = Unseen(take, lambda step: bank.give_up(step, BETA2))
    for step in range(1, steps + 1):
        unseen.add(Batch(step, inputs(step, burst).to(DEVICE), torch.tensor(0.0)))
    unseen.settle()
    return bank


def inputs(step: int, burst: int) -> Tensor:
    x = normal(ROWS, D_IN, seed=step).float()
    return 30 * x if step == burst else x


def expected_after(arch: str, steps: int, *, burst: int = 0) -> FastBank:
    bank = FastBank(start(arch), torch.linspace(-0.2, 0.3, D_IN), torch.float32, path="dense")
    l1 = torch.tensor([0.2, 0.4], dtype=torch.float64)
    for step in range(1, steps + 1):
        bank.step(inputs(step, burst), l1, adam_at(step, torch.device("cpu")))
    return bank


def assert_same(bank: TritonBank, expected: FastBank) -> None:
    begun = start("gated" if "b_gate" in bank.params else "relu")
    for name, values in expected.params.items():
        moved = values - torch.stack([getattr(sae, name) for sae in begun])
        assert (bank.params[name].cpu() - values).norm() <= 1e-3 * moved.norm(), name


@pytest.mark.parametrize("arch", ["gated", "relu"])
def test_an_sae_takes_up_the_sparse_step_and_ends_in_the_same_weights(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_bank, "LOOK_EVERY", 3)
    bank = bank_after(arch, 7, 0.6)
    assert bank.paths == ("sparse", "sparse")
    assert_same(bank, expected_after(arch, 7))


def test_where_nothing_was_measured_every_step_is_dense() -> None:
    bank = bank_after("gated", 2, 0.0)
    assert bank.paths == ("dense", "dense")
    assert bank.went is None
    assert_same(bank, expected_after("gated", 2))


def test_steps_after_an_overflow_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_bank, "LOOK_EVERY", 2)
    given_up: list[int] = []
    give_up = TritonBank.give_up
    monkeypatch.setattr(TritonBank, "give_up", lambda b, step, beta2: (given_up.append(step), give_up(b, step, beta2)))
    bank = bank_after("gated", 6, 0.3, burst=5)
    assert given_up == [5]  # at step 5 more gates are open than at any other
    assert_same(bank, expected_after("gated", 6, burst=5))
    assert not bank.overflown.any()


def test_a_step_that_is_refused_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = TritonBank(start("gated"), torch.zeros(D_IN), torch.float32, DEVICE, sparse_share=0.2)
    bank.sparse[0] = True  # the other SAE takes the dense step
    l1 = torch.tensor([0.2, 0.4], dtype=torch.float64, device=DEVICE)
    before = {name: values.clone() for name, values in bank.state().items()}
    bank.step(30 * normal(ROWS, D_IN).float().to(DEVICE), l1, adam_at(1, DEVICE))
    assert bank.went is not None
    assert not bank.went
    after = bank.state()
    assert all(torch.equal(after[name], values) for name, values in before.items() if name != "steps")


def test_a_step_whose_number_the_device_alone_knows_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_bank, "LOOK_EVERY", 2)
    known = bank_after("gated", 3, 0.6)
    bank = TritonBank(start("gated"), torch.linspace(-0.2, 0.3, D_IN), torch.float32, DEVICE, sparse_share=0.6)
    l1 = torch.tensor([0.2, 0.4], dtype=torch.float64, device=DEVICE)
    for step in range(1, 4):
        adam = adam_at(step, DEVICE)
        bank.step(inputs(step, 0).to(DEVICE), l1, replace(adam, step=torch.tensor(step, device=DEVICE)))
        bank.look(step, ROWS)
    assert bank.paths == ("sparse", "sparse")
    assert all(torch.equal(bank.state()[name], values) for name, values in known.state().items())


class NothingWaits(TorchDispatchMode):
    """Refuses what waits for a GPU, or what a CUDA graph cannot record."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_fill_.Tensor")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert not any(name in str(func) for name in self.WAITING), func
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing() -> None:
    bank = TritonBank(start("gated"), torch.zeros(D_IN), torch.float32, DEVICE, sparse_share=0.6)
    bank.sparse[0] = True
    l1 = torch.tensor([0.2, 0.4], dtype=torch.float64, device=DEVICE)
    adam = replace(adam_at(1, DEVICE), step=torch.tensor(1, device=DEVICE))
    bank.step(inputs(1, 0).to(DEVICE), l1, adam)
    with NothingWaits():
        bank.step(inputs(1, 0).to(DEVICE), l1, adam)


def test_a_restored_bank_goes_on_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_bank, "LOOK_EVERY", 2)
    whole = bank_after("gated", 6, 0.6)
    half = bank_after("gated", 4, 0.6)
    again = TritonBank(start("gated"), torch.linspace(-0.2, 0.3, D_IN), torch.float32, DEVICE, sparse_share=0.6)
    again.restore({name: values.clone() for name, values in half.state().items()})
    assert "sparse" in again.paths
    l1 = torch.tensor([0.2, 0.4], dtype=torch.float64, device=DEVICE)
    for step in (5, 6):
        again.step(inputs(step, 0).to(DEVICE), l1, adam_at(step, DEVICE))
    assert all(torch.equal(again.state()[name], values) for name, values in whole.state().items())
