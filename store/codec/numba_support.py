"""Inner loops that are compiled with numba where it is installed, and are plain numpy where it is not."""

from collections.abc import Callable
from typing import Any

from .streaming import HAVE_NUMBA

if HAVE_NUMBA:
    import numba


def compiled_or(plain: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile the decorated loop when numba is there, else use `plain`; `.plain` is always the numpy version.

    A compiled loop holds no GIL, and its code is kept beside the source from one process to the next.
    """

    def choose(loop: Callable[..., Any]) -> Callable[..., Any]:
        chosen: Any = numba.njit(cache=True, nogil=True)(loop) if HAVE_NUMBA else plain
        chosen.plain = plain
        return chosen  # type: ignore[no-any-return]

    return choose
