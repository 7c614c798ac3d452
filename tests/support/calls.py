"""The calls that change a folder, seen one by one: recorded, killed at, or held.

What the store does to a file system goes through `open`, `write`, `os.fsync` and so on; while they are watched, each
such call on a path below a root runs between two hooks.
"""

import builtins
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch


@dataclass(frozen=True)
class Call:
    """A call: its kind, the path that it makes, changes or takes away, and where a link or a new name comes from.

    Paths are relative to the root.
    """

    kind: str
    path: str
    source: str = ""


Hook = Callable[[Call], None]


@contextmanager
def watched(root: Path, before: Hook, after: Hook) -> Iterator[None]:
    """Run `before` and `after` around every call on a path below `root` in this process."""

    def around(kind: str, path: Any, call: Callable[[], Any], source: Any = None) -> Any:
        where = _path(path)
        if where != root and root not in where.parents:
            return call()
        seen = Call(kind, str(where.relative_to(root)), str(_path(source).relative_to(root)) if source else "")
        before(seen)
        try:
            return call()
        finally:
            after(seen)

    def on_one(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda path, *args, **options: around(kind, path, lambda: function(path, *args, **options))

    def on_two(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda old, new, **options: around(kind, new, lambda: function(old, new, **options), old)

    def watched_open(path: Any, *args: Any, **options: Any) -> Any:
        file = around("open", path, lambda: real_open(path, *args, **options))
        if file.writable():
            file.write = on_file(file, file.write)
        return file

    def on_file(file: Any, write: Callable[[Any], int]) -> Callable[[Any], Any]:
        return lambda data: around("write", file.fileno(), lambda: write(data))

    real_open = builtins.open
    one = {name: on_one(name, getattr(os, name)) for name in ("open", "mkdir", "rmdir", "unlink", "fsync")}
    two = {name: on_two(name, getattr(os, name)) for name in ("link", "rename", "replace")}
    with (
        patch.multiple(os, **one, **two),
        patch.object(builtins, "open", watched_open),
        patch.object(io, "open", watched_open),
    ):
        yield


def _path(path: Any) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.abspath(path))  # noqa: PTH100, PTH115


def recorded(root: Path, work: Callable[[], Any]) -> list[Call]:
    """Run `work` and return its calls below `root`, in order."""
    calls: list[Call] = []
    with watched(root, calls.append, lambda call: None):
        work()
    return calls


def kill_at(root: Path, moment: int, work: Callable[[], Any]) -> None:
    """Run `work` and kill this process by SIGKILL at a moment: 2 k is before call k, 2 k + 1 after it."""
    left = moment

    def count(call: Call) -> None:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    with watched(root, count, count):
        work()
