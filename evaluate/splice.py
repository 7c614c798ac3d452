"""What the language model loses when a site is replaced: by zero, by the mean row, by an SAE's
reconstruction.

One pass a condition, and clean, zero and mean are shared by every SAE of the site. Only positions that are
rows of the store are replaced; all others (BOS, padding, rows over the norm limit) keep the model's own
activation in every condition, so that all differ from clean in the same places. Costs 3 + SAEs passes over
the contexts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .metrics import Sae, ratio, row_norms

Edit = Callable[[Tensor], Tensor]
"""Takes the site's activation (contexts, context_size, d_in), returns what the model goes on with."""

Losses = Callable[[Tensor, Edit | None], Tensor]
"""Takes tokens (contexts, context_size) int64, returns the cross-entropy in nats of each next token,
(contexts, context_size - 1), with the site edited (or not)."""

GROUP_TOKENS = 2048  # tokens of one forward pass: logits of a large vocabulary are what fills memory

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class CrossEntropies:
    """Sums over the counted tokens of each context, (contexts,), in nats; spliced by SAE name."""

    tokens: NDArray[np.int64]
    clean: Sums
    zero: Sums
    mean: Sums
    spliced: dict[str, Sums]

    def score(self, name: str) -> float | None:
        """Return `ce_loss_score`: 1 - (CE(spliced) - CE(clean)) / (CE(zero) - CE(clean)).

        Rajamanoharan et al. 2024 call it loss recovered; here zero stands at stored positions only. None
        where zero ablation changes nothing.
        """
        return score(self.spliced[name], self.clean, self.zero)

    def score_mean(self, name: str) -> float | None:
        """Return `ce_loss_score` against ablation by the mean row instead of zero."""
        return score(self.spliced[name], self.clean, self.mean)


def score(spliced: Sums, clean: Sums, ablated: Sums) -> float | None:
    """Return the share of the ablation's loss that `spliced` recovers, from sums over contexts."""
    lost = ratio(float(spliced.sum() - clean.sum()), float(ablated.sum() - clean.sum()))
    return None if lost is None else 1.0 - lost


def replacing(stored: Tensor, norm_limit: float, value: Callable[[Tensor], Tensor]) -> Edit:
    """Return the edit that puts `value(rows)` at stored positions whose row has a norm under `norm_limit`.

    stored: (contexts, context_size) bool. value: from float32 rows (rows, d_in) to rows, or to one row
    (d_in,) for all of them; what it returns is cast to the activation's dtype.
    """

    def edit(activation: Tensor) -> Tensor:
        here = stored.to(activation.device) & (row_norms(activation) < norm_limit)
        new = torch.zeros_like(activation)
        new[here] = value(activation[here].float()).to(activation)
        return torch.where(here[..., None], new, activation)

    return edit


def reconstructing(sae: Sae, device: str) -> Callable[[Tensor], Tensor]:
    """Return the map from rows to the reconstruction of an SAE that is on `device`."""
    return lambda x: sae.decode(sae.encode(x.to(device)))


@torch.no_grad()
def splice(
    losses: Losses,
    saes: Mapping[str, Sae],
    tokens: NDArray[np.int32],
    stored: NDArray[np.bool_],
    excluded_ids: tuple[int, ...],
    *,
    mean: NDArray[np.float64],
    norm_limit: float,
    device: str = "cpu",
    listen: Callable[[int], None] = lambda done: None,
) -> CrossEntropies:
    """Measure the cross-entropies of every condition on all of `tokens` (contexts, context_size).

    stored: (contexts, context_size), which positions are replaced. A loss counts when its target token is not
    one of `excluded_ids`, so padding and ends of documents never do. mean: (d_in,) the row that mean ablation
    puts in. device: where the SAEs are. `listen` is told how many contexts are done after each group.
    """
    average = torch.from_numpy(np.array(mean, dtype=np.float32))
    values = {name: reconstructing(sae, device) for name, sae in saes.items()}
    counted = ~np.isin(tokens[:, 1:], np.asarray(excluded_ids, dtype=np.int32))
    clean, zero, centre = (np.zeros(len(tokens)) for _ in range(3))
    spliced = {name: np.zeros(len(tokens)) for name in saes}
    for part in groups(*tokens.shape):
        ids, here = torch.from_numpy(tokens[part].astype(np.int64)), torch.from_numpy(stored[part])

        def total(edit: Edit | None, ids: Tensor = ids, part: slice = part) -> Sums:
            return counted_sums(losses(ids, edit), counted[part])

        clean[part] = total(None)
        zero[part] = total(replacing(here, norm_limit, torch.zeros_like))
        centre[part] = total(replacing(here, norm_limit, lambda x: average.to(x.device)))
        for name, value in values.items():
            spliced[name][part] = total(replacing(here, norm_limit, value))
        listen(part.stop)
    return CrossEntropies(counted.sum(1), clean, zero, centre, spliced)


def groups(contexts: int, context_size: int) -> Iterator[slice]:
    """Cut contexts into groups of about GROUP_TOKENS tokens."""
    size = max(1, GROUP_TOKENS // context_size)
    yield from (slice(start, min(start + size, contexts)) for start in range(0, contexts, size))


def counted_sums(losses: Tensor, counted: NDArray[np.bool_]) -> Sums:
    """Sum each context's losses (contexts, context_size - 1) over the counted targets, in float64."""
    wide = losses.double().cpu().numpy()
    return np.asarray(np.where(counted, wide, 0.0).sum(1), dtype=np.float64)
