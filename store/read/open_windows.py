"""Which shard files are open: those of the windows in use, and the next ones, opened before their first chunk.

A file of a remote store is fetched whole when it is opened, so files are opened in parallel, while others are being
decoded. With two ahead and two being finished, a cache needs room for open_windows + 4 files.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from gsae.errors import GsaeError, SpaceError
from gsae.store.places.shard import ShardReader

from .read_order import Mix, Shuffle, window_order
from .shard_file import ShardFile

AT_ONCE = 8
AHEAD = 2


class OpenWindows:
    """The open shards by window. Call `enter` for each mix in order, and `leave` for a window at its last chunk."""

    def __init__(self, files: Sequence[ShardFile], shuffle: Shuffle) -> None:
        """Open nothing yet. files: one for each window."""
        self._files, self._shuffle = files, shuffle
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="gsae-open")
        self._open: dict[int, ShardReader] = {}
        self._ahead: dict[int, Future[ShardReader]] = {}
        self._order: tuple[int, list[int]] = (-1, [])
        self._every: list[ShardReader] = []

    def enter(self, mix: Mix) -> dict[int, ShardReader]:
        """Return the open shards of the windows of a mix, and start to open the windows after them."""
        wanted = dict.fromkeys(pick.window for pick in mix.picks)
        missing = [window for window in wanted if window not in self._open]
        for window in missing:
            self._begin(window)
        for window in missing:
            future = self._ahead.pop(window)
            try:
                shard = future.result()
            except SpaceError:
                self._close_ahead()
                shard = self._files[window].open()
            self._open[window] = shard
            self._every = [*(each for each in self._every if not each.closed), shard]
        if missing:
            self._look_ahead(mix)
        return {window: self._open[window] for window in wanted}

    def leave(self, window: int) -> ShardReader:
        """Return the shard of a window that no later mix of this epoch needs. The caller closes it."""
        return self._open.pop(window)

    def close(self) -> None:
        """Close all files. No thread may be decoding."""
        self._close_ahead()
        self._pool.shutdown(wait=True)
        for shard in self._every:
            shard.close()

    def _begin(self, window: int) -> None:
        if window not in self._open and window not in self._ahead:
            self._ahead[window] = self._pool.submit(self._files[window].open)

    def _look_ahead(self, mix: Mix) -> None:
        if self._order[0] != mix.epoch:
            self._order = (mix.epoch, window_order(len(self._files), self._shuffle, mix.epoch))
        order = self._order[1]
        furthest = max(order.index(pick.window) for pick in mix.picks)
        for window in order[furthest + 1 : furthest + 1 + AHEAD]:
            self._begin(window)

    def _close_ahead(self) -> None:
        """Close the files that were opened ahead; an error of opening one is raised when its window is needed."""
        for future in self._ahead.values():
            if not future.cancel():
                with suppress(GsaeError, OSError):
                    future.result().close()
        self._ahead.clear()
