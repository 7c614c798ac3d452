"""What is counted for the SAEs of a run over one stream of rows: totals, firings of each latent, sums by document.

Each batch is prepared once for all SAEs. Two norms cut the rows into three bands, and each band has its own totals. So
one pass gives the metrics of the kept rows, of all rows and of all rows but the largest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .eval_json import Density
from .metrics import Autoencoder, PreparedRows, Reconstruction, Totals, sums_device

DENSE_SHARE = 10  # a latent is dense when it fires on more than one row in this many
DENSITY_EDGES = np.linspace(-8, 0, 33)  # log10 of the share of rows on which a latent fires
BANDS = 3


@dataclass(frozen=True)
class NormBands:
    """Where norms cut the rows. A row is kept when ||x|| < limit, and below the cut when ||x|| < cut; inf for no cut.

    Band 0 is below both norms, band 1 between them, band 2 beyond both.
    """

    limit: float
    cut: float = np.inf

    @property
    def kept(self) -> int:
        """How many bands, from band 0 on, are within the limit."""
        return 1 if self.limit < self.cut else 2

    @property
    def below_cut(self) -> int:
        """How many bands, from band 0 on, are below the cut."""
        return BANDS - self.kept

    def of(self, norms: Tensor) -> Tensor:
        """Return the band of each norm, (rows,); a NaN is in the last one."""
        edges = torch.tensor(sorted((self.limit, self.cut)), dtype=torch.float64, device=norms.device)
        return (~(norms[:, None] < edges)).sum(1)


class DocumentSums:
    """Sums by document of the kept rows: columns (documents,) float64 by name."""

    def __init__(self, documents: int, *names: str) -> None:
        """Start with sums of 0."""
        self.columns: dict[str, NDArray[np.float64]] = {name: np.zeros(documents) for name in names}

    def add(self, document: NDArray[np.int64], **values: Tensor) -> None:
        """Add values (rows,) of rows of the documents with these indices (rows,)."""
        for name, value in values.items():
            column = self.columns[name]
            column += np.bincount(document, value.double().cpu().numpy(), len(column))


class SaeMeasurement:
    """What is counted for one SAE: totals of each band; for the kept rows also firings and sums by document."""

    def __init__(self, sae: Autoencoder, documents: int, norms: NormBands, device: torch.device) -> None:
        """Start with no rows of `documents` documents. device: where sums are computed."""
        self._sae, self._norms = sae, norms
        self.bands = [Totals.zero(sae.d_in, device) for _ in range(BANDS)]
        self.fires = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)  # kept rows on which each latent fires
        self.sums = DocumentSums(documents, "l0", "sse", "square", "cross")

    def add(self, band: int, rows: PreparedRows, document: NDArray[np.int64], shift: Tensor) -> None:
        """Count rows of one band."""
        made = Reconstruction.of(rows, self._sae)
        self.bands[band].add(rows, made, shift)
        if band < self._norms.kept:
            self.fires += made.fires
            self.sums.add(document, l0=made.l0, sse=made.sse, square=made.square, cross=made.cross)

    @property
    def kept(self) -> Totals:
        """Totals of the rows within the norm limit."""
        return reduce(add, self.bands[: self._norms.kept])

    @property
    def below_cut(self) -> Totals:
        """Totals of all rows but the largest."""
        return reduce(add, self.bands[: self._norms.below_cut])

    @property
    def all(self) -> Totals:
        """Totals of all rows."""
        return reduce(add, self.bands)

    @property
    def silent(self) -> float | None:
        """Share of latents that fire on none of the kept rows."""
        return None if self.kept.rows == 0 else int((self.fires == 0).sum()) / self._sae.d_sae

    @property
    def dense(self) -> float | None:
        """Share of latents that fire on more than 10 % of the kept rows."""
        rows = self.kept.rows
        return None if rows == 0 else int((self.fires * DENSE_SHARE > rows).sum()) / self._sae.d_sae

    def density(self) -> Density:
        """Return how many latents fire on which share of the kept rows.

        A bin includes its lower edge, the last bin also its upper edge. Shares below the first edge are in the first
        bin.
        """
        fires = self.fires.cpu().numpy()
        shares = np.log10(fires[fires > 0] / max(self.kept.rows, 1))
        counts, _ = np.histogram(np.maximum(shares, DENSITY_EDGES[0]), DENSITY_EDGES)
        return Density(log10_edges=DENSITY_EDGES.tolist(), latents=counts.tolist(), silent=int((fires == 0).sum()))


class Measurement:
    """All SAEs of a site over one stream of rows, in any order and any batches.

    How the stream is cut changes only the rounding of the float64 sums and of the SAE's float32 products.
    """

    def __init__(
        self,
        saes: Mapping[str, Autoencoder],
        mean: NDArray[np.float64],
        documents: int,
        norms: NormBands,
        device: str = "cpu",
    ) -> None:
        """Start with no rows.

        mean: (d_in,) of the kept rows. Sums by document are about it; all others are corrected for its error.
        documents: how many documents the rows come from. device: where the SAEs are, and where sums over dimensions
        are computed if it has float64.
        """
        there = sums_device(device)
        self.documents, self.norms = documents, norms
        self.inputs = DocumentSums(documents, "rows", "sst")
        self.saes = {name: SaeMeasurement(sae, documents, norms, there) for name, sae in saes.items()}
        self._shift = torch.from_numpy(np.array(mean, dtype=np.float64)).to(there)
        self._device = device

    @torch.no_grad()
    def add(self, x: Tensor, document: NDArray[np.int64]) -> None:
        """Count rows x (rows, d_in) of the documents with the indices `document` (rows,)."""
        rows = PreparedRows.of(x, self._shift, self._device)
        bands = self.norms.of(rows.norm)
        for band in range(BANDS):
            here = bands == band
            if bool(here.all()):
                self._add_band(band, rows, document)
            elif bool(here.any()):
                self._add_band(band, rows.pick(here.nonzero()[:, 0]), document[here.cpu().numpy()])

    def _add_band(self, band: int, rows: PreparedRows, document: NDArray[np.int64]) -> None:
        if band < self.norms.kept:
            self.inputs.add(document, rows=torch.ones_like(rows.norm), sst=rows.shifted.square().sum(1))
        for measured in self.saes.values():
            measured.add(band, rows, document, self._shift)
