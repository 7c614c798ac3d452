"""Which shard files are open: those of the windows at hand, and the next ones, opened ahead of their first chunk.

A file of a remote store is fetched whole when it is opened, so files are opened side by side, and while others are
still being decoded. Two ahead keep a cache of open_windows + 4 files large enough, with two that are being finished.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

from gsae.errors import GsaeError, SpaceError
from gsae.store.places.shard import Shard

from .read_order import Group, Shuffle, window_order

AT_ONCE = 8
AHEAD = 2


class Opens(Protocol):
    """A file that can be opened."""

    def open(self) -> Shard:
        """Open it; raises as `Shard` does."""


class OpenWindows:
    """The open shards by window; `enter` each group in turn, `leave` a window at its last chunk."""

    def __init__(self, files: Sequence[Opens], shuffle: Shuffle) -> None:
        """Nothing is opened yet. files: one a window."""
        self._files, self._shuffle = files, shuffle
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="gsae-open")
        self._open: dict[int, Shard] = {}
        self._ahead: dict[int, Future[Shard]] = {}
        self._order: tuple[int, list[int]] = (-1, [])
        self._every: list[Shard] = []

    def enter(self, group: Group) -> dict[int, Shard]:
        """Return the shards of a group's windows, all opened, and begin with the windows after them."""
        wanted = dict.fromkeys(pick.window for pick in group.picks)
        missing = [window for window in wanted if window not in self._open]
        for window in missing:
            self._begin(window)
        for window in missing:
            future = self._ahead.pop(window)
            try:
                shard = future.result()
            except SpaceError:
                self._let_go()
                shard = self._files[window].open()
            self._open[window] = shard
            self._every = [*(each for each in self._every if not each.closed), shard]
        if missing:
            self._look_ahead(group)
        return {window: self._open[window] for window in wanted}

    def leave(self, window: int) -> Shard:
        """Return the shard of a window that no other group needs this epoch; whoever decodes it last closes it."""
        return self._open.pop(window)

    def close(self) -> None:
        """Close all files; nothing may be decoding any more."""
        self._let_go()
        self._pool.shutdown(wait=True)
        for shard in self._every:
            shard.close()

    def _begin(self, window: int) -> None:
        if window not in self._open and window not in self._ahead:
            self._ahead[window] = self._pool.submit(self._files[window].open)

    def _look_ahead(self, group: Group) -> None:
        if self._order[0] != group.epoch:
            self._order = (group.epoch, window_order(len(self._files), self._shuffle, group.epoch))
        order = self._order[1]
        furthest = max(order.index(pick.window) for pick in group.picks)
        for window in order[furthest + 1 : furthest + 1 + AHEAD]:
            self._begin(window)

    def _let_go(self) -> None:
        """Close what was opened ahead; a fault there is told when the window is needed."""
        for future in self._ahead.values():
            if not future.cancel():
                with suppress(GsaeError, OSError):
                    future.result().close()
        self._ahead.clear()
