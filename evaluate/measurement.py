"""What is counted for the SAEs of a run over one stream of rows: totals, latents that fire, sums by context.

Each batch is prepared once for all SAEs. Rows over the norm limit are counted apart, so the figures of the kept rows
and those of all rows come from one pass. Costs (contexts, d_in) float64 of memory for the sums by context.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .metrics import Reconstruction, Rows, Sae, Totals

DENSE_SHARE = 10  # a latent is dense when it fires on more than one row in this many


@dataclass
class ContextSums:
    """Per-context sums of the kept rows, shared by the SAEs of a run; primes are values less the shift."""

    rows: Tensor  # (contexts,) int64
    square: Tensor  # (contexts,) float64, sum ||x'||^2
    shifted: Tensor  # (contexts, d_in) float64, sum x'

    @classmethod
    def zero(cls, contexts: int, d_in: int) -> "ContextSums":
        """Return the sums of no rows."""
        wide = torch.zeros(contexts, dtype=torch.float64)
        return cls(wide.long(), wide, torch.zeros(contexts, d_in, dtype=torch.float64))

    def add(self, rows: Rows, context: Tensor) -> None:
        """Count rows; context: (rows,) the index of each row's context."""
        self.rows.index_add_(0, context, torch.ones_like(context))
        self.square.index_add_(0, context, rows.shifted.square().sum(1))
        self.shifted.index_add_(0, context, rows.shifted)

    def sst(self) -> Tensor:
        """Return each context's sum of ||x - mu||^2, (contexts,), with mu the mean of all kept rows."""
        offset = self.shifted.sum(0) / max(int(self.rows.sum()), 1)
        return self.square - 2 * self.shifted @ offset + self.rows * (offset @ offset)


@dataclass
class Tally:
    """What is counted for one SAE: rows within the norm limit, those beyond it, latents, contexts."""

    sae: Sae
    kept: Totals
    skipped: Totals
    fires: Tensor  # (d_sae,) int64: kept rows on which each latent fires
    l0: Tensor  # (contexts,) int64
    sse: Tensor  # (contexts,) float64

    @classmethod
    def zero(cls, sae: Sae, contexts: int) -> "Tally":
        """Return the tally of no rows."""
        per_context = torch.zeros(contexts, dtype=torch.float64)
        empty = Totals.zero(sae.d_in), Totals.zero(sae.d_in)
        return cls(sae, *empty, torch.zeros(sae.d_sae, dtype=torch.int64), per_context.long(), per_context)

    def add(self, rows: Rows, context: Tensor, shift: Tensor) -> None:
        """Count rows within the norm limit."""
        made = Reconstruction.of(rows, self.sae)
        self.kept.add(rows, made, shift)
        self.fires += made.fires
        self.l0.index_add_(0, context, made.l0)
        self.sse.index_add_(0, context, made.sse)

    def add_skipped(self, rows: Rows, shift: Tensor) -> None:
        """Count rows beyond the norm limit; they are part of the all-rows figures only."""
        self.skipped.add(rows, Reconstruction.of(rows, self.sae), shift)

    @property
    def silent(self) -> float | None:
        """Share of latents that fire on none of the kept rows."""
        return None if self.kept.rows == 0 else int((self.fires == 0).sum()) / self.sae.d_sae

    @property
    def dense(self) -> float | None:
        """Share of latents that fire on more than 10 % of the kept rows."""
        if self.kept.rows == 0:
            return None
        return int((self.fires * DENSE_SHARE > self.kept.rows).sum()) / self.sae.d_sae


class Measurement:
    """All SAEs of a site over one stream of rows, in any order and any batches.

    How the stream is cut changes only the rounding of float64 sums, and of the SAE's own float32 products.
    """

    def __init__(
        self,
        saes: Mapping[str, Sae],
        mean: NDArray[np.float64],
        contexts: NDArray[np.int64],
        norm_limit: float,
        device: str = "cpu",
    ) -> None:
        """Start at no rows.

        mean: (d_in,) a mean row, the shift of all moments. contexts: ascending numbers of the contexts that
        rows come from. norm_limit: a row is kept when ||x|| < norm_limit; inf keeps all. device: where the
        SAEs are; sums are made on the CPU.
        """
        self.shift = torch.from_numpy(np.array(mean, dtype=np.float64))
        self.contexts = contexts
        self.norm_limit = norm_limit
        self.device = device
        self.inputs = ContextSums.zero(len(contexts), len(mean))
        self.tallies = {name: Tally.zero(sae, len(contexts)) for name, sae in saes.items()}

    @torch.no_grad()
    def add(self, x: Tensor, context: NDArray[np.int64]) -> None:
        """Count rows x (rows, d_in) of the contexts with the numbers `context` (rows,)."""
        rows = Rows.of(x, self.shift, self.device)
        index = torch.from_numpy(np.searchsorted(self.contexts, context))
        kept = rows.norm < self.norm_limit
        if bool(kept.all()):
            self._add_kept(rows, index)
            return
        beyond = rows.pick(~kept)
        for tally in self.tallies.values():
            tally.add_skipped(beyond, self.shift)
        if bool(kept.any()):
            self._add_kept(rows.pick(kept), index[kept])

    def _add_kept(self, rows: Rows, index: Tensor) -> None:
        self.inputs.add(rows, index)
        for tally in self.tallies.values():
            tally.add(rows, index, self.shift)
