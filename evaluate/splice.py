"""What the language model loses when a site's activation is replaced: by zero, the mean row or a reconstruction.

Each condition is one pass; all SAEs of the site share the clean and the ablated passes. Only positions that are rows of
the store are replaced. All others (BOS, padding, rows over the norm limit) keep the model's own activation in every
condition, so that all conditions differ from the clean pass in the same places. The exception is `EVERYWHERE`, zero at
all positions, because SAELens ablates that way. The cost is 4 + SAEs passes over the contexts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .metrics import Autoencoder, row_norms, sums_device
from .ratio_errors import Estimate, Sums, ratio_of_sums

Edit = Callable[[Tensor], Tensor]
"""Takes the site's activation (contexts, context_size, d_in) and returns the one that the model continues with."""

Effects = Callable[[Tensor, Sequence[Edit]], tuple[Tensor, Tensor]]
"""The language model. Takes tokens (contexts, context_size) int64 and edits of the site. Returns the cross-entropy in
nats of each next token and KL(clean || edited) of its distribution, both (1 + edits, contexts, context_size - 1), with
the unedited model first."""

CLEAN, ZERO, MEAN, EVERYWHERE, SAES = range(5)  # conditions; those of the SAEs follow


@dataclass(frozen=True)
class Spliced:
    """Sums over the counted tokens of each context; losses and divergences are (conditions, contexts), in nats.

    The estimates are over what the sums are by: `spliced_documents.py` adds contexts up by document before.

    names: of the SAEs. A token counts in `loss` unless it is a special token, and in `loss_after` unless the token
    before it is one, as SAELens counts. tokens, tokens_after: (contexts,) how many tokens count.
    """

    names: tuple[str, ...]
    tokens: NDArray[np.int64]
    tokens_after: NDArray[np.int64]
    loss: Sums
    loss_after: Sums
    divergence: Sums

    @classmethod
    def joined(cls, parts: Sequence["Spliced"]) -> "Spliced":
        """Concatenate groups of contexts."""
        columns = {
            key: np.concatenate([getattr(part, key) for part in parts], axis=-1)
            for key in ("tokens", "tokens_after", "loss", "loss_after", "divergence")
        }
        return cls(parts[0].names, **columns)

    def condition(self, name: str) -> int:
        """Return the index of an SAE's condition."""
        return SAES + self.names.index(name)

    def score(self, name: str, ablation: int = ZERO) -> Estimate:
        """Return `ce_loss_score`: 1 - (CE(spliced) - CE(clean)) / (CE(ablated) - CE(clean)).

        Rajamanoharan et al. 2024 call it loss recovered. With EVERYWHERE it is over the tokens that SAELens counts.
        The value is None where ablation changes nothing.
        """
        loss = self.loss_after if ablation == EVERYWHERE else self.loss
        lost, ablated = loss[self.condition(name)] - loss[CLEAN], loss[ablation] - loss[CLEAN]
        return ratio_of_sums(lost, ablated).complement()

    def divergence_score(self, name: str) -> Estimate:
        """Return `kl_div_score`: 1 - KL(clean || spliced) / KL(clean || zero)."""
        return ratio_of_sums(self.divergence[self.condition(name)], self.divergence[ZERO]).complement()

    def means(self, name: str) -> dict[str, Estimate]:
        """Return mean cross-entropies and divergences in nats a token, under SAELens's names."""
        at = {"with_sae": self.condition(name), "with_ablation": ZERO, "with_mean_ablation": MEAN}
        losses = {"without_sae": CLEAN, **at}
        return {
            **{f"ce_loss_{key}": ratio_of_sums(self.loss[row], self.tokens) for key, row in losses.items()},
            **{f"kl_div_{key}": ratio_of_sums(self.divergence[row], self.tokens) for key, row in at.items()},
        }

    def means_after(self, name: str) -> dict[str, Estimate]:
        """Return the cross-entropies as SAELens computes them: over its tokens, with zero at all positions."""
        losses = {"without_sae": CLEAN, "with_sae": self.condition(name), "with_ablation": EVERYWHERE}
        return {f"ce_loss_{key}": ratio_of_sums(self.loss_after[row], self.tokens_after) for key, row in losses.items()}


@dataclass(frozen=True)
class Replacements:
    """What takes the place of a site's activation.

    saes: by name, on `device`. mean: (d_in,) the row of mean ablation. norm_limit: rows of this norm or more keep the
    model's own activation.
    """

    saes: Mapping[str, Autoencoder]
    mean: NDArray[np.float64]
    norm_limit: float
    device: str = "cpu"

    def edits(self, stored: Tensor) -> list[Edit]:
        """Return the edit of every condition but CLEAN, in order; stored: (contexts, context_size) bool."""
        mean = torch.from_numpy(np.array(self.mean, dtype=np.float32))
        zero = replace_rows(stored, self.norm_limit, torch.zeros_like)
        average = replace_rows(stored, self.norm_limit, lambda x: mean.to(x.device))
        spliced = [replace_rows(stored, self.norm_limit, reconstruct(sae, self.device)) for sae in self.saes.values()]
        return [zero, average, torch.zeros_like, *spliced]


def replace_rows(stored: Tensor, norm_limit: float, value: Callable[[Tensor], Tensor]) -> Edit:
    """Return the edit that puts `value(rows)` at stored positions where the row's norm is below `norm_limit`.

    stored: (contexts, context_size) bool. value: maps float32 rows (rows, d_in) to rows of that shape, or to one row
    (d_in,) for all of them; its result is cast to the activation's dtype.
    """

    def edit(activation: Tensor) -> Tensor:
        norms = row_norms(activation.to(sums_device(activation.device)))
        found = (stored.to(norms.device) & (norms < norm_limit)).nonzero(as_tuple=True)
        here = tuple(index.to(activation.device) for index in found)
        edited = activation.clone()
        edited[here] = value(activation[here].float()).to(activation)
        return edited

    return edit


def reconstruct(sae: Autoencoder, device: str) -> Callable[[Tensor], Tensor]:
    """Return the map from rows to their reconstruction by an SAE that is on `device`."""
    return lambda x: sae.decode(sae.encode(x.to(device)))


@torch.no_grad()
def splice(
    effects: Effects,
    replacements: Replacements,
    tokens: NDArray[np.int32],
    stored: NDArray[np.bool_],
    excluded_ids: tuple[int, ...],
) -> Spliced:
    """Run every condition on `tokens` (contexts, context_size).

    stored: (contexts, context_size), which positions are replaced. excluded_ids: the special tokens; padding and ends
    of documents are among them and are never counted.
    """
    edits = replacements.edits(torch.from_numpy(stored))
    found = effects(torch.from_numpy(tokens.astype(np.int64)), edits)
    losses, divergences = (values.double().numpy() for values in found)
    special = np.isin(tokens, np.asarray(excluded_ids, dtype=np.int32))
    counted, after = ~special[:, 1:], ~special[:, :-1]
    return Spliced(
        tuple(replacements.saes),
        counted.sum(1),
        after.sum(1),
        np.where(counted, losses, 0.0).sum(-1),
        np.where(after, losses, 0.0).sum(-1),
        np.where(counted, divergences, 0.0).sum(-1),
    )
