"""The decorator of every compiled loop of the store. The first call in a new environment compiles, for seconds."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(loop: Loop) -> Loop:
    """Compile a loop with numba. It releases the GIL, and its machine code is cached beside the source file."""
    return cast(Loop, numba.njit(cache=True, nogil=True)(loop))
