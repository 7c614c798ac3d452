"""A recorded step does what a launched one does. A stub stands for the GPU: it records launches, not results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gsae.train.step.step_graph import WARM_UPS, StepGraph


class FakeGraph:
    def __init__(self) -> None:
        self.launches: list[Callable[[], object]] = []

    def replay(self) -> None:
        for launch in self.launches:
            launch()


class FakeCuda:
    """What `StepGraph` needs of torch.cuda: while a graph is recorded, launches are kept and do nothing."""

    CUDAGraph = FakeGraph

    def __init__(self) -> None:
        self.recording: FakeGraph | None = None
        self.recorded = 0

    @contextmanager
    def graph(self, graph: FakeGraph, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.recording, self.recorded = graph, self.recorded + 1
        yield
        self.recording = None

    def launch(self, work: Callable[[], object]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.launches.append(work)


class Counter:
    """A step that adds its inputs up in place, and gives its total in memory of its own."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.total, self.calls = cuda, torch.zeros(2), 0

    def __call__(self, x: Tensor, factor: Tensor) -> Tensor:
        self.calls += 1
        result = torch.empty(2)
        self.cuda.launch(lambda: self.total.add_(x * factor))
        self.cuda.launch(lambda: result.copy_(self.total))
        return result


def test_a_graph_takes_the_inputs_of_each_call() -> None:
    cuda = FakeCuda()
    counter = Counter(cuda)
    step, expected = StepGraph(counter, cuda), torch.zeros(2)
    for number in range(10):
        x, factor = torch.tensor([1.0, number]), torch.tensor(2.0 + number)
        result = step("dense", x, factor)
        expected += x * factor
        assert result is not None
        assert torch.equal(result, expected)
    assert cuda.recorded == 1
    assert counter.calls == WARM_UPS + 1


def test_a_step_of_another_kind_is_recorded_anew() -> None:
    cuda = FakeCuda()
    counter = Counter(cuda)
    step, one = StepGraph(counter, cuda), torch.ones(2)
    for kind in ["dense"] * 6 + ["sparse"] * 6 + ["dense"] * 2:
        step(kind, one, one)
    assert cuda.recorded == 2
    assert counter.calls == 2 * (WARM_UPS + 1) + 2
    assert torch.equal(counter.total, 14 * one)
