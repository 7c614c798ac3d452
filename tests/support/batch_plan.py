"""The batches in which a harvest runs the contexts of a store, computed from docs/format.md with nothing of gsae's."""

from itertools import pairwise

import numpy as np

from gsae.store import Store


def philox(n: int, seed: int, stream: int, index: int = 0) -> np.ndarray:
    """The permutation that docs/format.md describes."""
    generator = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=np.array([0, 0, index, 0], np.uint64))
    return np.argsort(generator.random_raw(n), kind="stable")


def planned_batches(store: Store) -> list[np.ndarray]:
    """The ids of every forward call, from tokens and plan, as docs/format.md describes them."""
    plan, tokens, split = store.plan, store.tokens(), store.split()
    rows = (~np.isin(tokens, plan.tokenizer.excluded_ids)).sum(1)
    found = []
    for number, stream in ((1, 3), (0, 2)):
        contexts = np.flatnonzero(split == number)
        contexts = contexts[philox(len(contexts), plan.seed, stream)]
        owner = np.repeat(contexts, rows[contexts])[: plan.heldout_rows if number else plan.rows]
        for start in range(0, len(owner), plan.window_rows):
            own = list(dict.fromkeys(owner[start : start + plan.window_rows].tolist()))
            batches = -(-len(own) // plan.batch_size)
            bounds = [len(own) * i // batches for i in range(batches + 1)]
            found += [tokens[own[a:b]] for a, b in pairwise(bounds)]
    return found
