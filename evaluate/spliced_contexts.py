"""Which held-out contexts run through the language model, and the sums over them.

Contexts run in groups of at most GROUP_TOKENS tokens, which bounds the memory of a forward pass.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsae.store import Store, StoreSet, Stream, permutation, row_mask

from .events import Listen, Progress
from .splice import Effects, Replacements, Spliced, splice

GROUP_TOKENS = 2048  # of one forward pass


@dataclass(frozen=True)
class SplicedContexts:
    """numbers: (contexts,) of the contexts that ran, ascending. sums: over the tokens of each of them."""

    numbers: NDArray[np.int64]
    sums: Spliced


def choose_contexts(heldout: NDArray[np.int64], seed: int, limit: int | None) -> NDArray[np.int64]:
    """Return at most `limit` of the held-out contexts, ascending: the first ones in the order of their rows."""
    order = permutation(len(heldout), seed, Stream.HELDOUT_CONTEXTS)
    return np.sort(heldout[order[:limit]])


def splice_contexts(
    effects: Effects,
    replacements: Replacements,
    store: Store | StoreSet,
    contexts: NDArray[np.int64],
    listen: Listen,
) -> SplicedContexts:
    """Run the language model over the contexts with these numbers, one group after another."""
    plan, parts = store.plan, []
    special = plan.tokenizer.excluded_ids
    size = max(1, GROUP_TOKENS // plan.context_size)
    for first in range(0, len(contexts), size):
        group = contexts[first : first + size]
        tokens = store.tokens_around(group * plan.context_size, 0, plan.context_size - 1)
        stored = row_mask(tokens, special, plan.dropped_positions)
        parts.append(splice(effects, replacements, tokens, stored, special))
        listen(Progress("contexts", first + len(group), len(contexts)))
    return SplicedContexts(contexts, Spliced.joined(parts))
