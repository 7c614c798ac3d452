"""Rows on their way to a window: copied on a side stream, in order, and never overwritten too early."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gsae.harvest.row_mover import LEAD, HostCopier, Mover, PinnedCopier


class SlowCopier:
    """Copies into one buffer for each slot, as PinnedCopier does; each copy ends when the test allows it."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[int, str], Tensor] = {}
        self.staged: dict[tuple[int, str], np.ndarray] = {}
        self.held: set[tuple[int, str]] = set()
        self.let = threading.Semaphore(0)

    def stage(self, values: np.ndarray, slot: tuple[int, str]) -> Tensor:
        held = self.staged.setdefault(slot, np.empty_like(values))
        held[:] = values
        return torch.from_numpy(held)

    def send(self, rows: Tensor, slot: tuple[int, str]) -> Callable[[], Tensor]:
        assert slot not in self.held, "a slot is used again before its rows are in their places"
        self.held.add(slot)
        self.buffers[slot] = rows.clone()

        def arrived() -> Tensor:
            self.let.acquire()
            self.held.remove(slot)
            return self.buffers[slot]

        return arrived

    def mark(self) -> float:
        return 0.0

    def seconds(self, begin: float, end: float) -> float:
        return 1.0


def batches(count: int, rows: int, width: int) -> tuple[list[Tensor], list[np.ndarray], np.ndarray]:
    places = np.random.default_rng(0).permutation(count * rows)
    values = torch.randn(count * rows, width, dtype=torch.bfloat16)
    expected = np.empty((count * rows, width), np.uint16)
    expected[places] = values.view(torch.uint16).numpy()
    return list(values.split(rows)), np.split(places, count), expected


def test_at_most_lead_batches_are_under_way_and_all_arrive() -> None:
    values, places, expected = batches(7, 20, 32)
    copier, out, sent = SlowCopier(), np.empty_like(batches(7, 20, 32)[2]), list[int]()

    def put_all(mover: Mover) -> None:
        for number, (rows, to) in enumerate(zip(values, places, strict=True)):
            mover.put({"a": rows}, lambda: {"a": out}, to, 0.0)
            sent.append(number)

    with Mover(copier) as mover:
        thread = threading.Thread(target=put_all, args=(mover,))
        thread.start()
        for number in range(7):
            while len(sent) < min(number + LEAD, 7):  # it gets as far as the lead allows
                thread.join(0.001)
            assert len(sent) == min(number + LEAD, 7)
            copier.let.release()
        thread.join()
        mover.drain()
        assert mover.busy_seconds == 7.0
    assert np.array_equal(out, expected)


def test_the_input_of_a_pass_stays_until_the_pass_has_ended() -> None:
    """A pass reads its input as late as its rows arrive; meanwhile the inputs of later passes are staged."""
    copier, out, staged, found = SlowCopier(), np.empty((1, 1), np.uint32), list[Tensor](), list[int]()

    def run_all(mover: Mover) -> None:
        for number in range(9):
            staged.append(mover.stage("token ids", np.array([number])))
            mover.put({"a": torch.ones(1, 1)}, lambda: {"a": out}, np.array([0]), mover.mark())

    with Mover(copier) as mover:
        thread = threading.Thread(target=run_all, args=(mover,))
        thread.start()
        for number in range(9):
            while len(staged) < min(number + LEAD + 1, 9):
                thread.join(0.001)
            found.append(staged[number].item())
            copier.let.release()
        thread.join()
        mover.drain()
    assert found == list(range(9))
    assert len(copier.staged) == LEAD + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moving_rows_keeps_their_bits(dtype: torch.dtype) -> None:
    rows = torch.tensor([[1.0, float("nan")], [-0.0, float("-inf")]]).to(dtype)
    kind = {2: np.uint16, 4: np.uint32}[rows.itemsize]
    out = np.zeros((3, 2), kind)
    with Mover(HostCopier()) as mover:
        mover.put({"a": rows}, lambda: {"a": out}, np.array([2, 0]), mover.mark()).result()
    bits = {2: torch.uint16, 4: torch.uint32}[rows.itemsize]
    assert np.array_equal(out[[2, 0]], rows.view(bits).numpy())
    assert not out[1].any()


def test_an_error_while_moving_rows_is_raised() -> None:
    class Failing(HostCopier):
        def send(self, rows: Tensor, slot: tuple[int, str]) -> Callable[[], Tensor]:
            def arrived() -> Tensor:
                raise RuntimeError("the device is gone")

            return arrived

    with Mover(Failing()) as mover:
        moved = mover.put({"a": torch.ones(1, 1)}, lambda: {"a": np.empty((1, 1), np.uint32)}, np.array([0]), 0.0)
        with pytest.raises(RuntimeError, match="gone"):
            moved.result()
        with pytest.raises(RuntimeError, match="gone"):
            mover.drain()


class Cuda:
    """Replaces torch.cuda: records the calls to streams and events, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.enable_timing = enable_timing

            def record(self, stream: Any) -> None:
                cuda.calls.append(f"record on {stream}")

            def synchronize(self) -> None:
                cuda.calls.append("synchronize")

            def elapsed_time(self, end: Any) -> float:
                assert self.enable_timing
                assert end.enable_timing
                return 250.0

        class Stream:
            def __init__(self, device: Any) -> None:
                cuda.calls.append("new stream")

            def wait_stream(self, other: Any) -> None:
                cuda.calls.append(f"wait for {other}")

            def record_event(self) -> Event:
                cuda.calls.append("record the end of the copy")
                return Event()

        self.Event, self.Stream = Event, Stream

    def current_stream(self, device: Any) -> str:
        return "the passes"

    def stream(self, stream: Any) -> Any:
        from contextlib import nullcontext

        self.calls.append("on the side stream")
        return nullcontext()


class OnDevice:
    """Rows on a CUDA device, as far as the copier uses them."""

    device = torch.device("cuda:0")

    def __init__(self, rows: Tensor, cuda: Cuda) -> None:
        self.rows, self.cuda, self.shape, self.dtype = rows, cuda, rows.shape, rows.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def record_stream(self, stream: Any) -> None:
        self.cuda.calls.append("keep the rows for the side stream")


def test_a_copy_waits_for_the_pass_and_is_waited_for_before_it_is_read() -> None:
    """Checks the order of the calls to CUDA; what CUDA does with them needs a GPU and is not tested here."""
    cuda, pinned = Cuda(), list[tuple[int, ...]]()

    class Buffer:
        def __init__(self, rows: int) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return self.rows

        def __getitem__(self, part: slice) -> "Buffer":
            return Buffer(part.stop)

        def copy_(self, rows: Any, non_blocking: bool) -> None:
            assert non_blocking
            cuda.calls.append("copy")

    def empty(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> Any:
        assert pin_memory
        pinned.append(tuple(shape))
        return Buffer(shape[0])

    copier = PinnedCopier(torch.device("cuda:0"), 8, cuda, empty)
    began = copier.mark()
    arrived = copier.send(OnDevice(torch.ones(5, 2), cuda), (0, "a"))  # type: ignore[arg-type]
    assert cuda.calls == [
        "record on the passes",
        "new stream",
        "wait for the passes",
        "on the side stream",
        "copy",
        "record the end of the copy",
        "keep the rows for the side stream",
    ]
    assert len(arrived()) == 5
    assert cuda.calls[-1] == "synchronize"
    copier.send(OnDevice(torch.ones(3, 2), cuda), (0, "a"))  # type: ignore[arg-type]
    copier.send(OnDevice(torch.ones(6, 2), cuda), (0, "a"))  # type: ignore[arg-type]
    assert pinned == [(8, 2)]  # one for all batches, as large as the largest may be
    assert copier.seconds(began, copier.mark()) == 0.25
    rows = torch.ones(2, 2)
    assert copier.send(rows, (1, "a"))() is rows  # from a layer on the CPU


def test_inputs_are_staged_in_pinned_memory_that_is_made_once() -> None:
    pinned = list[Tensor]()

    def empty(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        pinned.append(torch.empty(shape, dtype=dtype))
        return pinned[-1]

    copier = PinnedCopier(torch.device("cuda:0"), 12, Cuda(), empty)
    for values in (np.arange(6).reshape(2, 3), np.arange(12).reshape(4, 3), np.arange(5)):
        staged = copier.stage(values, (0, "token ids"))
        assert np.array_equal(staged.numpy(), values)
        assert staged.dtype == torch.int64
        assert staged.data_ptr() == pinned[0].data_ptr()
    assert copier.stage(np.arange(5), (1, "token ids")).data_ptr() != pinned[0].data_ptr()
    assert len(pinned) == 2
