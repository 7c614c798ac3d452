"""What rows become before any SAE sees them: scaled to E||z||^2 = 1, less their mean, in float32 on the run's device.

Also which rows are none: those over the norm limit, and, when told to, those with a NaN or an infinity.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gsae.errors import UsageError
from gsae.store import Site, Summary

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
    def of(cls, site: Site, run: RunConfig, device: str) -> "Inputs":
        """Read it off the site's moments; raises UsageError where there is nothing to train on, or a NaN."""
        summary = site.moments.within(run.max_norm_multiple)
        if not summary.rows or summary.mean_square_norm <= 0:
            raise UsageError(f"Site {site.name!r} has no rows to train on, or only rows of zeros.")
        if site.moments.non_finite and not run.skip_nonfinite:
            raise UsageError(
                f"{site.moments.non_finite} rows of site {site.name!r} have a NaN or an infinity, the first "
                f"{first_nonfinite(site)}. Leave them out with --skip-nonfinite."
            )
        scale = summary.mean_square_norm**-0.5
        centre = torch.from_numpy(summary.mean * scale).float().to(device)
        return cls(site, summary, scale, centre, torch.device(device))

    def scaled(self, rows: Tensor) -> Tensor:
        """Raw rows (rows, d_in) as the SAEs are defined on them."""
        return rows.to(self.device, torch.float32) * self.scale

    def heldout(self, count: int) -> Tensor | None:
        """The first held-out rows of the store within the norm limit, at most `count`, scaled; None without any."""
        site = replace(self.site, split="heldout")
        if not site.rows:
            return None
        rows = site[: min(count, site.rows)]
        kept = rows[rows.double().norm(dim=1) < self.summary.norm_limit]
        return self.scaled(kept) if len(kept) else None

    def to_resample_from(self, run: RunConfig, step: int) -> Tensor:
        """Train rows (rows, d_in) of another order than the run's, scaled: those that a resampling draws from.

        They are read beside the stream, and follow from the run's settings and the step alone.
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
    """Say where a site's first row with a NaN or an infinity is."""
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
