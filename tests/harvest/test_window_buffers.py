"""Two buffers of windows: when each may be filled again, what the model waits for, and what an error stops."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gsae.harvest.row_mover import LEAD, HostCopier, Mover
from gsae.harvest.window_buffers import BUFFERS, IN_FILES, WindowBuffers
from gsae.store import ContextsSpec, WindowTotals
from gsae.tests.support.stores import NOBODY, make_plan, random_contexts

ROWS, D_IN = 8, 16
PATIENCE = 10.0


class Windows:
    """Fills one window after another; encoding and publishing of each end when the test allows it."""

    def __init__(self, windows: int, mover: Mover, written: Callable[[Any], None] = lambda record: None) -> None:
        arrays = random_contexts(10, 8)
        contexts = ContextsSpec(
            contexts=10, context_size=8, documents=10, ended_early=False,
            tokens_sha256=NOBODY, split_sha256=NOBODY, documents_sha256=NOBODY,
        )  # fmt: skip
        plan = make_plan(contexts, arrays, {"mlp.0": D_IN})
        self.buffers = WindowBuffers(plan, ROWS, written, WindowTotals(plan))
        self.mover = mover
        self.may_encode = [threading.Event() for _ in range(windows)]
        self.may_publish = [threading.Event() for _ in range(windows)]
        self.put: list[int] = []  # the window of each batch that was put
        self.stored: dict[int, np.ndarray] = {}
        self.published: list[int] = []

    def run(self, batches: int = 4) -> None:
        """Put the batches of all windows; the rows of window n have the value n."""
        for number in range(len(self.may_encode)):
            rows = self.buffers.take(ROWS)
            moves = []
            for targets in np.split(np.arange(ROWS), batches):
                values = torch.full((len(targets), D_IN), float(number), dtype=torch.bfloat16)
                moves.append(self.mover.put({"mlp.0": values}, rows, targets, self.mover.mark()))
                self.put.append(number)
            self.buffers.write(lambda number=number, rows=rows, moves=moves: self._encode(number, rows, moves))

    def _encode(self, number: int, rows: Callable[[], Any], moves: list[Any]) -> "Encoded":
        for move in moves:
            move.result()
        assert self.may_encode[number].wait(PATIENCE)
        self.stored[number] = rows()["mlp.0"].copy()
        return Encoded(self, number)

    def allow(self, events: list[threading.Event]) -> None:
        for event in events:
            event.set()


class Encoded:
    """As EncodedWindow; its record is the number of the window."""

    def __init__(self, windows: Windows, number: int) -> None:
        self.windows, self.number = windows, number

    def publish(self, totals: Any) -> int:
        assert self.windows.may_publish[self.number].wait(PATIENCE)
        self.windows.published.append(self.number)
        return self.number


def settled(windows: Windows, batches: int) -> list[int]:
    """The windows of the batches that were put, once there are so many of them and some time for another one."""
    deadline = time.monotonic() + PATIENCE
    while len(windows.put) < batches and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.1)
    return list(windows.put)


def test_passes_go_on_until_lead_batches_wait_for_a_buffer() -> None:
    """Nothing is encoded: two windows are full, and only then do batches wait for their places."""
    with Mover(HostCopier()) as mover:
        windows = Windows(BUFFERS + 1, mover)
        with windows.buffers:
            thread = threading.Thread(target=windows.run)
            thread.start()
            assert settled(windows, 8 + LEAD) == [0] * 4 + [1] * 4 + [2] * LEAD
            windows.may_encode[0].set()
            assert settled(windows, 12) == [0] * 4 + [1] * 4 + [2] * 4  # though nothing is published yet
            windows.allow(windows.may_encode + windows.may_publish)
            thread.join()
            windows.buffers.finish()
    assert windows.published == [0, 1, 2]
    bits = {number: torch.tensor(float(number)).to(torch.bfloat16).view(torch.uint16).item() for number in range(3)}
    assert {number: set(stored.ravel().tolist()) for number, stored in windows.stored.items()} == {
        number: {value} for number, value in bits.items()
    }


def test_a_window_is_filled_while_the_disk_writes_and_few_windows_are_in_files() -> None:
    """Nothing is published: the windows that are encoded are bounded too."""
    with Mover(HostCopier()) as mover:
        windows = Windows(IN_FILES + BUFFERS + 1, mover)
        windows.allow(windows.may_encode)
        with windows.buffers:
            thread = threading.Thread(target=windows.run)
            thread.start()
            full = [number for number in range(IN_FILES + BUFFERS) for _ in range(4)]
            assert settled(windows, len(full) + LEAD) == full + [IN_FILES + BUFFERS] * LEAD
            assert sorted(windows.stored) == list(range(IN_FILES))
            windows.allow(windows.may_publish)
            thread.join()
            windows.buffers.finish()
    assert windows.published == list(range(IN_FILES + BUFFERS + 1))


@pytest.mark.parametrize("step", ["encode", "publish"])
def test_a_window_that_fails_ends_the_passes_and_the_windows_after_it(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(step)

    monkeypatch.setattr(*((Windows, "_encode", fail) if step == "encode" else (Encoded, "publish", fail)))
    with Mover(HostCopier()) as mover:
        windows = Windows(6, mover)
        windows.allow(windows.may_encode + windows.may_publish)
        with windows.buffers:
            with pytest.raises(OSError, match=step):
                windows.run()
            with pytest.raises(OSError, match=step):
                windows.buffers.finish()
    assert windows.put[-1] < 5
    assert windows.published == []


def test_windows_are_reported_in_order_once_they_are_published() -> None:
    seen: list[int] = []
    with Mover(HostCopier()) as mover:
        windows = Windows(2, mover, seen.append)
        windows.allow(windows.may_encode)
        with windows.buffers:
            windows.run()
            windows.buffers.collect()
            assert seen == []
            windows.allow(windows.may_publish)
            while not seen:
                windows.buffers.collect()
            windows.buffers.finish()
    assert seen == [0, 1]
