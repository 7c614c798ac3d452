"""Chunks pass the steps that have an order one after the other, and a thread wakes only for its own turn."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from gsae.store.write.shard_writer import Turnstiles, _StoppedError

CHUNKS = 12


def waiting(turnstiles: Turnstiles, pool: ThreadPoolExecutor, passed: list[int]) -> "list[Future[None]]":
    """Let a thread for each chunk but the first come to its turn, the last one first."""

    def take(chunk: int) -> None:
        with turnstiles.turn("file", 0, chunk):
            passed.append(chunk)

    taken = []
    for chunk in range(CHUNKS - 1, 0, -1):
        taken.append(pool.submit(take, chunk))
        while len(turnstiles._waiting) < len(taken):
            threading.Event().wait(0.001)
    return taken


def test_each_thread_wakes_once_in_the_order_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[object] = []  # the lock of each condition on which a thread woke

    class Counted(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            found = super().wait(timeout)
            woken.append(self._lock)
            return found

    monkeypatch.setattr(threading, "Condition", Counted)
    turnstiles, passed = Turnstiles(), list[int]()
    with ThreadPoolExecutor(CHUNKS) as pool:
        taken = waiting(turnstiles, pool, passed)
        with turnstiles.turn("file", 0, 0):
            assert passed == []
        for each in taken:
            each.result()
    assert passed == list(range(1, CHUNKS))
    assert woken.count(turnstiles._lock) == CHUNKS - 1


def test_a_failure_stops_every_thread_that_waits_or_comes_later() -> None:
    turnstiles, passed = Turnstiles(), list[int]()
    with ThreadPoolExecutor(CHUNKS) as pool:
        taken = waiting(turnstiles, pool, passed)
        turnstiles.fail()
        assert all(isinstance(each.exception(timeout=10), _StoppedError) for each in taken)
    with pytest.raises(_StoppedError), turnstiles.turn("file", 0, 0):
        pass
    assert passed == []
