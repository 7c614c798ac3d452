"""One stream of batches for several consumers of a process: decoded once, handed to each.

Whoever needs the next batch first fetches it, and it stays until all have had it, so the fastest is at most `lead`
batches ahead of the slowest and waits there. Memory: `lead` batches more than one consumer takes.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Self

from torch import Tensor

from .batches import Batches, Position


class Feed:
    """The batches that some consumers have had and others have not, oldest first."""

    def __init__(self, batches: Batches, consumers: int, lead: int) -> None:
        """Hand out `batches`, which nobody else may use."""
        self.start = batches.state_dict()
        self._batches, self._lead = batches, lead
        self._held: deque[tuple[Tensor, Position]] = deque()
        self._first = 0
        self._at: dict[int, int] = dict.fromkeys(range(consumers), 0)
        self._fetching = False
        self._end: BaseException | None = None
        self._changed = threading.Condition()

    def take(self, consumer: int) -> tuple[Tensor, Position]:
        """Return a consumer's next batch and the position after it; raises StopIteration at the end."""
        with self._changed:
            while consumer in self._at:
                ahead = self._at[consumer] - self._first
                if ahead < len(self._held):
                    return self._hand_out(consumer, ahead)
                if self._end is not None:
                    raise self._end
                if not self._fetching and len(self._held) < self._lead:
                    self._fetch()
                else:
                    self._changed.wait()
            raise StopIteration

    def leave(self, consumer: int) -> None:
        """Go on without a consumer; the last one closes the stream."""
        with self._changed:
            if self._at.pop(consumer, None) is None:
                return
            self._let_go()
            self._changed.notify_all()
            if not self._at:
                self._batches.close()

    def _hand_out(self, consumer: int, ahead: int) -> tuple[Tensor, Position]:
        batch = self._held[ahead]
        self._at[consumer] += 1
        if not ahead:
            self._let_go()
        return batch

    def _let_go(self) -> None:
        """Drop what every consumer has had, which makes room for more."""
        slowest = min(self._at.values(), default=self._first + len(self._held))
        if slowest > self._first:
            for _ in range(slowest - self._first):
                self._held.popleft()
            self._first = slowest
            self._changed.notify_all()

    def _fetch(self) -> None:
        """Fetch the next batch with the lock released, so that others can take what is held."""
        self._fetching = True
        self._changed.release()
        batch: tuple[Tensor, Position] | None = None
        end: BaseException | None = None
        try:
            batch = next(self._batches), self._batches.state_dict()
        except BaseException as error:
            end = error
        finally:
            self._changed.acquire()
            self._fetching = False
            self._end = end
            if batch is not None:
                self._held.append(batch)
            self._changed.notify_all()


class SharedBatches(Iterator[Tensor]):
    """One consumer's view of a shared stream, each used from a thread of its own; like `Batches` in all else.

    A batch is the same memory for all consumers: who wants to change it makes a copy.
    """

    def __init__(self, feed: Feed, consumer: int) -> None:
        """Take part in `feed` as number `consumer`."""
        self._feed, self._consumer = feed, consumer
        self._position = feed.start
        self.wait_seconds = 0.0
        weakref.finalize(self, feed.leave, consumer).atexit = False

    @property
    def skipped(self) -> int:
        """Rows left out so far, since the very beginning."""
        return self._position["skipped"]

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last batch that this consumer was handed."""
        return dict(self._position)

    def __next__(self) -> Tensor:
        started = time.perf_counter()
        try:
            rows, self._position = self._feed.take(self._consumer)
        finally:
            self.wait_seconds += time.perf_counter() - started
        return rows

    def close(self) -> None:
        """Leave the stream to the others."""
        self._feed.leave(self._consumer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
