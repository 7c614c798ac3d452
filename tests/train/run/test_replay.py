"""Steps that the device refused are taken again, in order and on their own batches, whenever the host looks."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gsae.train.run.replay import Batch, Unseen


class Device:
    """Takes steps unless a flag is set, as `TritonBank`; `bad` maps a step to how often it sets the flag."""

    def __init__(self, bad: dict[int, int]) -> None:
        self.bad, self.flag = dict(bad), False
        self.taken: list[tuple[int, float]] = []
        self.refused: list[int] = []

    def take(self, batch: Batch) -> Tensor:
        if not self.flag and self.bad.get(batch.step, 0):
            self.flag = True
            self.bad[batch.step] -= 1
        if not self.flag:
            self.taken.append((batch.step, float(batch.x)))
        return torch.tensor(not self.flag)

    def give_up(self, step: int) -> None:
        assert self.flag
        assert step == len(self.taken) + 1  # the first that did not take place
        self.refused.append(step)
        self.flag = False


@given(
    bad=st.dictionaries(st.integers(1, 12), st.integers(1, 3), max_size=6),
    settled=st.sets(st.integers(1, 12), max_size=4),
)
def test_every_step_takes_place_once_and_in_order(bad: dict[int, int], settled: set[int]) -> None:
    device = Device(bad)
    unseen = Unseen(device.take, device.give_up)
    for step in range(1, 13):
        unseen.add(Batch(step, torch.tensor(10.0 * step), torch.tensor(0.0)))
        if step in settled:
            unseen.settle()
            assert len(device.taken) == step
    unseen.settle()
    assert device.taken == [(step, 10.0 * step) for step in range(1, 13)]
    assert device.refused == [step for step in sorted(bad) for _ in range(bad[step])]


def test_the_host_looks_one_step_late() -> None:
    device = Device({2: 1})
    unseen = Unseen(device.take, device.give_up)
    for step in (1, 2):
        unseen.add(Batch(step, torch.tensor(1.0), torch.tensor(0.0)))
    assert device.flag  # step 2 is not looked at before step 3 is on its way
    unseen.add(Batch(3, torch.tensor(1.0), torch.tensor(0.0)))
    assert not device.flag
    assert [step for step, _ in device.taken][:2] == [1, 2]
