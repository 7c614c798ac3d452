"""What follows from a latent's decoder row alone: the latents with similar rows, and the tokens that it promotes."""

import torch
from torch import Tensor


def neighbours(W_dec: Tensor, first: int, last: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` other latents of largest decoder cosine, and the cosines, both (last - first, count).

    W_dec: (d_sae, d_in) of unit rows. first, last: the range of latents, `last` not included.
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
