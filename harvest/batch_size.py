"""The batch size that `--batch-size auto` finds, and what happens if a pass runs out of memory later.

The size is part of the plan, so it is found before the plan is written: it starts at a budget of tokens and is halved
until two passes fit, the second with the activations of the first still in memory, as in the harvest. Nothing is timed,
so equal devices find equal sizes. The size never changes after that: a pass that does not fit is tried once more, then
the run ends.
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
from .model.pass_errors import is_out_of_memory

# Tokens of a batch beyond which passes get no faster: a GPU is busy with these, and on a CPU more would not fit its
# caches.
BUDGET_TOKENS = {"cpu": 1 << 12}
GPU_BUDGET_TOKENS = 1 << 16

T = TypeVar("T")


def choose_batch_size(lm: LanguageModel, sites: Sequence[SiteSpec], tokens: NDArray[np.int32]) -> int:
    """Return how many contexts of `tokens` (contexts, context_size) fit into one pass.

    Raises SpaceError if not even one context fits.
    """
    context_size = tokens.shape[1]
    size: int = max(BUDGET_TOKENS.get(lm.device.type, GPU_BUDGET_TOKENS) // context_size, 1)
    while not _fits(lm, sites, np.resize(tokens, (size, context_size))):
        if size == 1:
            raise SpaceError(
                f"Not even one context of {context_size} tokens fits into the memory of {lm.device}. "
                "Use a smaller --context-size, or --device-map auto."
            )
        size //= 2
    return size


def run_twice(run: Callable[[], T], make_room: Callable[[], None], contexts: int) -> T:
    """Return what `run` returns; if it runs out of memory, call `make_room`, empty the caches and run it once more.

    contexts: of the batch, for the message. Raises SpaceError if memory runs out again.
    """
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    make_room()  # not in the handler above, where the traceback keeps the tensors of the failed pass alive
    empty_caches()
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    raise SpaceError(
        f"A batch of {contexts} contexts does not fit into memory, tried twice. The batch size cannot change any more: "
        "free memory on the device and run the same command again, or use another folder with a smaller --batch-size."
    )


def empty_caches() -> None:
    """Free the memory that Python and torch's allocators for GPUs hold without using it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


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
