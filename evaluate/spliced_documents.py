"""Which held-out contexts run through the language model, and the sums over them, added up by document.

Contexts run in groups of at most GROUP_TOKENS tokens, which bounds the memory of a forward pass.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gsae.store import Store, StoreSet, Stream, permutation, row_mask

from .events import Listen, Progress
from .heldout_documents import HeldoutDocuments, sum_by
from .splice import Effects, Replacements, Spliced, splice

GROUP_TOKENS = 2048  # of one forward pass


@dataclass(frozen=True)
class SplicedDocuments:
    """contexts: how many ran. documents: the indices of their documents, ascending. sums: over each document."""

    contexts: int
    documents: NDArray[np.int64]
    sums: Spliced


def choose_contexts(heldout: NDArray[np.int64], seed: int, limit: int | None) -> NDArray[np.int64]:
    """Return at most `limit` of the held-out contexts, ascending: the first ones in the order of their rows."""
    order = permutation(len(heldout), seed, Stream.HELDOUT_CONTEXTS)
    return np.sort(heldout[order[:limit]])


def splice_documents(
    effects: Effects,
    replacements: Replacements,
    store: Store | StoreSet,
    heldout: HeldoutDocuments,
    contexts: NDArray[np.int64],
    listen: Listen,
) -> SplicedDocuments:
    """Run the language model over the held-out contexts with these numbers, one group after another."""
    plan, parts = store.plan, []
    special = plan.tokenizer.excluded_ids
    size = max(1, GROUP_TOKENS // plan.context_size)
    for first in range(0, len(contexts), size):
        group = contexts[first : first + size]
        tokens = store.tokens_around(group * plan.context_size, 0, plan.context_size - 1)
        stored = row_mask(tokens, special, plan.dropped_positions)
        parts.append(splice(effects, replacements, tokens, stored, special))
        listen(Progress("contexts", first + len(group), len(contexts)))
    documents, index = np.unique(heldout.of_contexts(contexts), return_inverse=True)
    return SplicedDocuments(len(contexts), documents, _added_up(Spliced.joined(parts), index.reshape(-1)))


def _added_up(sums: Spliced, index: NDArray[np.int64]) -> Spliced:
    """Return the sums of contexts added up by document; index: (contexts,) of the document of each."""
    count = int(index.max()) + 1
    return replace(
        sums,
        tokens=sum_by(index, count, sums.tokens),
        tokens_after=sum_by(index, count, sums.tokens_after),
        loss=sum_by(index, count, sums.loss),
        loss_after=sum_by(index, count, sums.loss_after),
        divergence=sum_by(index, count, sums.divergence),
    )
