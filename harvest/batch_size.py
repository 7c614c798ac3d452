"""What fits: the batch size that `--batch-size auto` finds, and a pass that runs out of memory all the same.

The size is found before the plan is written, because it is part of it: from a budget of tokens downwards, halved until
two passes in a row fit while the rows of the ones before are still held, as in the harvest. Nothing is timed, so equal
devices find equal sizes. Later the size never changes: a pass that does not fit is tried once more, then the run ends.
"""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsae.errors import SpaceError
from gsae.store import SiteSpec

from .model.capture import LanguageModel, capture

# Tokens of a batch beyond which a pass gets no faster: a GPU is full there; on a CPU, where memory hardly ever fails
# a pass, more only leaves its caches.
BUDGET_TOKENS = {"cpu": 1 << 12}
GPU_BUDGET_TOKENS = 1 << 16

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error of a pass means that memory was short, on a GPU or on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )


def choose_batch_size(lm: LanguageModel, sites: Sequence[SiteSpec], tokens: NDArray[np.int32]) -> int:
    """Return how many contexts of `tokens` (contexts, context_size) a pass takes at once.

    Raises SpaceError where not even one fits.
    """
    context_size = tokens.shape[1]
    size: int = max(BUDGET_TOKENS.get(lm.device.type, GPU_BUDGET_TOKENS) // context_size, 1)
    while not _fits(lm, sites, np.resize(tokens, (size, context_size))):
        if size == 1:
            raise SpaceError(
                f"Not even one context of {context_size} tokens fits into the memory of {lm.device}: "
                "a smaller --context-size, or --device-map auto, is needed."
            )
        size //= 2
    return size


def run_twice(run: Callable[[], T], make_room: Callable[[], None], contexts: int) -> T:
    """Return what `run` gives; where memory is short, `make_room`, empty the caches and try once more.

    Raises SpaceError when it is short again.
    """
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    make_room()  # outside of the handler, whose traceback would hold the failed pass's tensors
    empty_caches()
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    raise SpaceError(
        f"A batch of {contexts} contexts does not fit into memory, tried twice. The batch size is part of the plan: "
        "make room on the device and run the same command again, or use another folder and a smaller --batch-size."
    )


def empty_caches() -> None:
    """Give back what Python and torch's CUDA allocator hold without using it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fits(lm: LanguageModel, sites: Sequence[SiteSpec], tokens: NDArray[np.int32]) -> bool:
    held: list[dict[str, Tensor]] = []
    try:
        for _ in range(2):
            held.append(capture(lm, sites, torch.from_numpy(tokens)))
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    fits = len(held) == 2
    held.clear()
    if not fits:
        empty_caches()
    return fits
