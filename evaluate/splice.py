"""What the language model loses when a site is replaced: by zero, by the mean row, by an SAE's reconstruction.

One pass a condition, and the clean and ablated ones are shared by every SAE of the site. Only positions that are rows
of the store are replaced; all others (BOS, padding, rows over the norm limit) keep the model's own activation in every
condition, so that all differ from clean in the same places. The exception is `EVERYWHERE`, zero at all positions, which
is there because SAELens ablates so. Costs 4 + SAEs passes over the contexts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .metrics import Sae, row_norms
from .ratio_errors import Estimate, Sums, ratio_of_sums

Edit = Callable[[Tensor], Tensor]
"""Takes the site's activation (contexts, context_size, d_in), returns what the model goes on with."""

Effects = Callable[[Tensor, Sequence[Edit]], tuple[Tensor, Tensor]]
"""The language model. Takes tokens (contexts, context_size) int64 and edits of the site; returns the cross-entropy in
nats of each next token, and KL(clean || edited) of its distribution, both (1 + edits, contexts, context_size - 1), the
untouched model first."""

CLEAN, ZERO, MEAN, EVERYWHERE, SAES = range(5)  # the conditions; those of the SAEs follow


@dataclass(frozen=True)
class Spliced:
    """Sums over the counted tokens of each context; losses and divergences are (conditions, contexts), in nats.

    names: of the SAEs. A token counts in `loss` when it is no special token itself, and in `loss_after` when the token
    before it is none, as SAELens has it. tokens, tokens_after: (contexts,) how many count.
    """

    names: tuple[str, ...]
    tokens: NDArray[np.int64]
    tokens_after: NDArray[np.int64]
    loss: Sums
    loss_after: Sums
    divergence: Sums

    @classmethod
    def joined(cls, parts: Sequence["Spliced"]) -> "Spliced":
        """Put groups of contexts one after the other."""
        columns = {
            key: np.concatenate([getattr(part, key) for part in parts], axis=-1)
            for key in ("tokens", "tokens_after", "loss", "loss_after", "divergence")
        }
        return cls(parts[0].names, **columns)

    def condition(self, name: str) -> int:
        """Return where an SAE stands among the conditions."""
        return SAES + self.names.index(name)

    def score(self, name: str, ablation: int = ZERO) -> Estimate:
        """Return `ce_loss_score`: 1 - (CE(spliced) - CE(clean)) / (CE(ablated) - CE(clean)).

        Rajamanoharan et al. 2024 call it loss recovered. Against EVERYWHERE it counts the tokens that SAELens
        counts. The value is None where ablation changes nothing.
        """
        loss = self.loss_after if ablation == EVERYWHERE else self.loss
        lost, ablated = loss[self.condition(name)] - loss[CLEAN], loss[ablation] - loss[CLEAN]
        return ratio_of_sums(lost, ablated).complement()

    def divergence_score(self, name: str) -> Estimate:
        """Return `kl_div_score`: 1 - KL(clean || spliced) / KL(clean || zero)."""
        return ratio_of_sums(self.divergence[self.condition(name)], self.divergence[ZERO]).complement()

    def means(self, name: str) -> dict[str, Estimate]:
        """Return cross-entropies and divergences in nats a token, under SAELens's names."""
        at = {"with_sae": self.condition(name), "with_ablation": ZERO, "with_mean_ablation": MEAN}
        losses = {"without_sae": CLEAN, **at}
        return {
            **{f"ce_loss_{key}": ratio_of_sums(self.loss[row], self.tokens) for key, row in losses.items()},
            **{f"kl_div_{key}": ratio_of_sums(self.divergence[row], self.tokens) for key, row in at.items()},
        }

    def means_after(self, name: str) -> dict[str, Estimate]:
        """Return the cross-entropies of SAELens's form: its tokens, and zero at all positions."""
        losses = {"without_sae": CLEAN, "with_sae": self.condition(name), "with_ablation": EVERYWHERE}
        return {f"ce_loss_{key}": ratio_of_sums(self.loss_after[row], self.tokens_after) for key, row in losses.items()}


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
    effects: Effects,
    saes: Mapping[str, Sae],
    tokens: NDArray[np.int32],
    stored: NDArray[np.bool_],
    excluded_ids: tuple[int, ...],
    *,
    mean: NDArray[np.float64],
    norm_limit: float,
    device: str = "cpu",
) -> Spliced:
    """Run every condition on `tokens` (contexts, context_size).

    stored: (contexts, context_size), which positions are replaced. excluded_ids: the special tokens, so that padding
    and ends of documents are never counted. mean: (d_in,) the row that mean ablation puts in. device: where the SAEs
    are.
    """
    ids, here = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(stored)
    average = torch.from_numpy(np.array(mean, dtype=np.float32))
    values = [torch.zeros_like, lambda x: average.to(x.device)]
    edits = [replacing(here, norm_limit, value) for value in values]
    edits += [torch.zeros_like, *(replacing(here, norm_limit, reconstructing(sae, device)) for sae in saes.values())]
    losses, divergences = (found.double().numpy() for found in effects(ids, edits))
    special = np.isin(tokens, np.asarray(excluded_ids, dtype=np.int32))
    counted, after = ~special[:, 1:], ~special[:, :-1]
    return Spliced(
        tuple(saes),
        counted.sum(1),
        after.sum(1),
        np.where(counted, losses, 0.0).sum(-1),
        np.where(after, losses, 0.0).sum(-1),
        np.where(counted, divergences, 0.0).sum(-1),
    )
