"""What rows become before an SAE sees them: scaled to E||x||^2 = 1, less their mean, float32 on the device of the run.

Rows over the norm limit are left out, and, with `skip_nonfinite`, rows with a NaN or an infinity.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from gsae.errors import UsageError
from gsae.store import Site, Summary
from gsae.train.step.wide import wide

from .config import RunConfig
from .lr_schedule import seed_at

RESAMPLING_ROWS, RESAMPLING_BATCH = 32768, 4096


@dataclass(frozen=True)
class Inputs:
    """The rows of a run; `centre` (d_in) is the mean of the scaled rows."""

    site: Site
    summary: Summary
    scale: float
    centre: Tensor
    device: torch.device

    @classmethod
    def of(cls, site: Site, run: RunConfig) -> Self:
        """Read them from the moments of the site, on the CPU.

        Raises UsageError if there are no rows to train on, or rows with a NaN that `skip_nonfinite` does not leave out.
        """
        summary = site.moments.within(run.max_norm_multiple)
        if not summary.rows or summary.mean_square_norm <= 0:
            raise UsageError(f"Site {site.name!r} has no rows to train on, or only rows of zeros.")
        if site.moments.non_finite and not run.skip_nonfinite:
            raise UsageError(
                f"{site.moments.non_finite} rows of site {site.name!r} have a NaN or an infinity, the first "
                f"{first_nonfinite(site)}. Leave them out with --skip-nonfinite."
            )
        scale = summary.mean_square_norm**-0.5
        return cls(site, summary, scale, torch.from_numpy(summary.mean * scale).float(), torch.device("cpu"))

    def to(self, device: str) -> Self:
        """The same on another device."""
        return replace(self, centre=self.centre.to(device), device=torch.device(device))

    def scaled(self, rows: Tensor) -> Tensor:
        """Raw rows (rows, d_in), times the scale, as the SAEs are defined on them."""
        return rows.to(self.device, torch.float32) * self.scale

    def centred(self, rows: Tensor, kernels: str | None) -> tuple[Tensor, Tensor]:
        """Raw rows (rows, d_in), scaled and less their mean, as a step takes them, and their sum of squares ().

        kernels: "triton" for one pass on a GPU.
        """
        if kernels == "triton":
            from gsae.train.step.inputs_triton import centred  # Triton comes with torch for CUDA alone

            return centred(rows.to(self.device), self.scale, self.centre)
        x = self.scaled(rows) - self.centre
        return x, x.square().sum(dtype=wide(x.device))

    def heldout(self, count: int) -> Tensor | None:
        """Those of the first `count` held-out rows that are within the norm limit, scaled; None if there are none."""
        site = replace(self.site, split="heldout")
        if not site.rows:
            return None
        rows = site[: min(count, site.rows)]
        kept = rows[rows.double().norm(dim=1) < self.summary.norm_limit]
        return self.scaled(kept) if len(kept) else None

    def to_resample_from(self, run: RunConfig, step: int) -> Tensor:
        """The scaled train rows (rows, d_in) that a resampling draws from.

        They are read in another order than that of the run, and follow from its settings and the step alone.
        """
        found: list[Tensor] = []
        with self.site.batches(
            min(RESAMPLING_BATCH, self.summary.rows),
            seed=seed_at(run.data_seed, step),
            max_norm_multiple=run.max_norm_multiple,
        ) as batches:
            for rows in batches:
                found.append(self.scaled(rows))
                if sum(map(len, found)) >= RESAMPLING_ROWS:
                    break
        return torch.cat(found)


def first_nonfinite(site: Site) -> str:
    """Say where the first row of a site with a NaN or an infinity is."""
    row = 0
    for sources, rows in site.in_order():
        bad = (~torch.isfinite(rows.float()).all(1)).nonzero()
        if len(bad):
            at = int(bad[0])
            size = site.store.plan.context_size
            context, position = divmod(int(sources[at]), size)
            window = (row + at) // site.store.plan.window_rows
            file = f"{site.split}/{site.spec.folder}/c/{window}/0"
            return f"row {row + at} in {file}, which is position {position} of context {context}"
        row += len(rows)
    return "not found: the store's moments are wrong"
