"""What is counted for the SAEs of a run over one stream of rows: totals, latents that fire, sums by context.

Each batch is prepared once for all SAEs. Two norms cut the rows into three bands, each with totals of its own, so the
figures of the kept rows, of all rows and of all but the largest come from one pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .metrics import Reconstruction, Rows, Sae, Totals

DENSE_SHARE = 10  # a latent is dense when it fires on more than one row in this many
DENSITY_EDGES = np.linspace(-8, 0, 33)  # log10 of the share of rows on which a latent fires

Column = NDArray[np.float64]


class ContextSums:
    """Sums by context of the kept rows, float64 (contexts,), by name."""

    def __init__(self, contexts: int, *names: str) -> None:
        """Start at no rows."""
        self.columns: dict[str, Column] = {name: np.zeros(contexts) for name in names}

    def add(self, context: NDArray[np.int64], **values: Tensor) -> None:
        """Add the values (rows,) of rows of the contexts with these indices (rows,)."""
        for name, value in values.items():
            column = self.columns[name]
            column += np.bincount(context, value.double().cpu().numpy(), len(column))


@dataclass
class Tally:
    """What is counted for one SAE: totals of each band of norms; of kept rows also latents and contexts."""

    sae: Sae
    bands: list[Totals]
    kept_bands: int  # the first so many bands are within the norm limit
    cut_bands: int  # and so many below the norm cut
    fires: Tensor  # (d_sae,) int64: kept rows on which each latent fires
    sums: ContextSums

    @classmethod
    def zero(cls, sae: Sae, contexts: int, kept_bands: int, cut_bands: int, device: str) -> "Tally":
        """Return the tally of no rows."""
        bands = [Totals.zero(sae.d_in, device) for _ in range(3)]
        fires = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        return cls(sae, bands, kept_bands, cut_bands, fires, ContextSums(contexts, "l0", "sse", "square", "cross"))

    def add(self, band: int, rows: Rows, context: NDArray[np.int64], shift: Tensor) -> None:
        """Count rows of one band."""
        made = Reconstruction.of(rows, self.sae)
        self.bands[band].add(rows, made, shift)
        if band < self.kept_bands:
            self.fires += made.fires
            self.sums.add(context, l0=made.l0, sse=made.sse, square=made.square, cross=made.cross)

    @property
    def kept(self) -> Totals:
        """Totals of the rows within the norm limit."""
        return reduce(add, self.bands[: self.kept_bands])

    @property
    def below_cut(self) -> Totals:
        """Totals of all rows but the largest."""
        return reduce(add, self.bands[: self.cut_bands])

    @property
    def all(self) -> Totals:
        """Totals of all rows."""
        return reduce(add, self.bands)

    @property
    def silent(self) -> float | None:
        """Share of latents that fire on none of the kept rows."""
        return None if self.kept.rows == 0 else int((self.fires == 0).sum()) / self.sae.d_sae

    @property
    def dense(self) -> float | None:
        """Share of latents that fire on more than 10 % of the kept rows."""
        rows = self.kept.rows
        return None if rows == 0 else int((self.fires * DENSE_SHARE > rows).sum()) / self.sae.d_sae

    def density(self) -> dict[str, list[float] | list[int] | int]:
        """Return how many latents fire on which share of the kept rows: counts between edges of its log10.

        A bin has its lower edge and the last one also its upper; shares under the first edge are in the first bin.
        """
        fires = self.fires.cpu().numpy()
        shares = np.log10(fires[fires > 0] / max(self.kept.rows, 1))
        counts, _ = np.histogram(np.maximum(shares, DENSITY_EDGES[0]), DENSITY_EDGES)
        return {
            "log10_edges": DENSITY_EDGES.tolist(),
            "latents": counts.tolist(),
            "silent": int((fires == 0).sum()),
        }


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
        norm_cut: float = np.inf,
        device: str = "cpu",
    ) -> None:
        """Start at no rows.

        mean: (d_in,) of the kept rows; sums by context are about it, all others are corrected for what it is off.
        contexts: ascending numbers of the contexts that rows come from. norm_limit: a row is kept when
        ||x|| < norm_limit; inf keeps all. norm_cut: rows of this norm or more are left out of `below_cut`. device:
        where the SAEs are, and sums over dimensions are made.
        """
        self.device = device
        self.shift = torch.from_numpy(np.array(mean, dtype=np.float64)).to(device)
        self.contexts = contexts
        self.edges = torch.tensor(sorted((norm_limit, norm_cut)), dtype=torch.float64, device=device)
        kept, cut = (1, 2) if norm_limit < norm_cut else (2, 1)
        self.kept_bands = kept
        self.inputs = ContextSums(len(contexts), "rows", "sst")
        self.tallies = {name: Tally.zero(sae, len(contexts), kept, cut, device) for name, sae in saes.items()}

    @torch.no_grad()
    def add(self, x: Tensor, context: NDArray[np.int64]) -> None:
        """Count rows x (rows, d_in) of the contexts with the numbers `context` (rows,)."""
        rows = Rows.of(x.to(self.device), self.shift)
        index = np.searchsorted(self.contexts, context)
        band = (~(rows.norm[:, None] < self.edges)).sum(1)  # a NaN is beyond both
        for number in range(3):
            here = band == number
            if bool(here.all()):
                self._add_band(number, rows, index)
            elif bool(here.any()):
                self._add_band(number, rows.pick(here), index[here.cpu().numpy()])

    def _add_band(self, band: int, rows: Rows, index: NDArray[np.int64]) -> None:
        if band < self.kept_bands:
            self.inputs.add(index, rows=torch.ones_like(rows.norm), sst=rows.shifted.square().sum(1))
        for tally in self.tallies.values():
            tally.add(band, rows, index, self.shift)
