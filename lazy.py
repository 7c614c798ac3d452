"""Rooms that import nothing until a name of theirs is used: `gsae train --help` then answers without torch.

Such a room has a `facade.py` that imports what the room exports; its `__init__` takes `__getattr__` from here.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def exports_of(package: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package: the first use of a name imports the package's `facade.py`."""

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.facade"), name)

    return find
