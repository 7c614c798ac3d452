"""What a latent's decoder row says by itself: which latents point the same way, and which tokens it speaks for."""

from collections.abc import Callable

import torch
from torch import Tensor

# (n, d_in) directions at a site -> (n, vocabulary) what a unit of each adds to the logits; the language model's part.
LogitEffects = Callable[[Tensor], Tensor]


def neighbours(W_dec: Tensor, first: int, last: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` other latents of largest decoder cosine, and the cosines, both (last - first, count).

    W_dec: (d_sae, d_in) of unit rows; of latents `first` to `last` (not included).
    """
    cosines = W_dec[first:last] @ W_dec.T
    own = torch.arange(first, last, device=W_dec.device)
    cosines[own - first, own] = -torch.inf
    found = cosines.topk(min(count, len(W_dec) - 1), dim=1)
    return found.indices.cpu(), found.values.cpu()


def outermost(effects: Tensor, count: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (token ids, logits) of the `count` most promoted and most suppressed tokens of effects (n, vocabulary)."""
    high = effects.topk(min(count, effects.shape[1]), dim=1)
    low = effects.topk(min(count, effects.shape[1]), dim=1, largest=False)
    return (high.indices.cpu(), high.values.cpu()), (low.indices.cpu(), low.values.cpu())
