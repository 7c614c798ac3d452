"""Everything that changes during a run: banks, their counters, the position in the data; and the metrics it yields.

What is counted is added up on the device and read only when a line of metrics is due. An SAE whose loss is not
finite keeps its slot and its weights of before, and is left out of every update and figure from then on.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gsae.store import IncompatibleError, Site, UsageError

from .bank import Adam, Bank, Figures
from .checkpoint import Checkpoint
from .config import RunConfig, SAEConfig
from .sae import initial
from .schedule import l1_factor, lr_factor

DEAD_ROWS = 10_000_000  # a latent is dead once silent for this many training rows, or one epoch's if those are fewer
TOTALS = ("loss", "squared_error", "l1", "l0", "norm", "inner")


@dataclass
class Group:
    """A bank with the settings of its SAEs and what is counted about them."""

    bank: Bank
    saes: tuple[SAEConfig, ...]
    lr: Tensor  # (saes,)
    l1: Tensor  # (saes,) float64
    totals: Tensor  # (len(TOTALS), saes) float64, since the last line of metrics
    silent: Tensor  # (saes, d_sae) int64, rows since each latent last fired
    stopped: Tensor  # (saes,) int64, the step at which the loss was not finite, -1 while it runs

    def step(self, x: Tensor, run: RunConfig, step: int) -> None:
        """Take one training step on x (rows, d_in), scaled and centred."""
        l1 = self.l1 * l1_factor(run, step)
        rates = torch.where(self.stopped < 0, self.lr * lr_factor(run, step), 0)
        figures = self.bank.step(x, l1, Adam(rates, run.adam_betas[1], run.adam_eps, step))
        loss = figures.loss(l1)
        self.stopped.masked_fill_((self.stopped < 0) & ~torch.isfinite(loss), step)
        running = self.stopped < 0
        self.totals += torch.where(running, _stacked(loss, figures), 0)
        self.silent.add_(len(x)).masked_fill_(figures.fired > 0, 0)


def _stacked(loss: Tensor, figures: Figures) -> Tensor:
    return torch.stack([loss, *(getattr(figures, name) for name in TOTALS[1:])])


class State:
    """A run at some step."""

    def __init__(self, site: Site, run: RunConfig) -> None:
        """Step 0 of a resolved run; raises UsageError where the site has nothing to train on."""
        self.summary = site.moments.within(run.max_norm_multiple)
        if not self.summary.rows or self.summary.mean_square_norm <= 0:
            raise UsageError(f"Site {site.name!r} has no rows to train on, or only rows of zeros.")
        self.scale = self.summary.mean_square_norm**-0.5
        self.dead_rows = min(DEAD_ROWS, self.summary.rows)
        self.step = 0
        self.reader: dict[str, int] | None = None
        self.device = torch.device(run.device or "cpu")
        self.centre = torch.from_numpy(self.summary.mean * self.scale).float().to(self.device)
        # Of the batches since the last line of metrics: rows, and the sum of ||z - mean||^2.
        self.seen = torch.zeros(2, dtype=torch.float64, device=self.device)
        shapes = dict.fromkeys((sae.arch, sae.d_sae) for sae in run.saes)
        self.groups = [self._group(site.d_in, run, arch, d_sae) for arch, d_sae in shapes]

    def _group(self, d_in: int, run: RunConfig, arch: str, d_sae: int) -> Group:
        saes = tuple(sae for sae in run.saes if (sae.arch, sae.d_sae) == (arch, d_sae))
        start = [initial(arch, d_in, d_sae, sae.seed, self.centre) for sae in saes]
        device, many = self.device, len(saes)
        return Group(
            bank=Bank(arch, start, self.centre, getattr(torch, run.precision), self.device),
            saes=saes,
            lr=torch.tensor([cast(float, sae.lr) for sae in saes], device=device),
            l1=torch.tensor([sae.l1_coefficient for sae in saes], dtype=torch.float64, device=device),
            totals=torch.zeros(len(TOTALS), many, dtype=torch.float64, device=device),
            silent=torch.zeros(many, d_sae, dtype=torch.int64, device=device),
            stopped=torch.full((many,), -1, dtype=torch.int64, device=device),
        )

    def advance(self, rows: Tensor, reader: dict[str, int], run: RunConfig) -> None:
        """Take one step of every SAE on raw rows (rows, d_in); `reader` is the position after them."""
        x = rows.to(self.device, torch.float32) * self.scale - self.centre
        self.step += 1
        self.reader = reader
        for group in self.groups:
            group.step(x, run, self.step)
        self.seen += torch.stack([self.seen.new_tensor(len(x)), x.square().sum(dtype=torch.float64)])

    def stopped(self) -> dict[str, int]:
        """The SAEs whose loss was not finite, with the step at which that was."""
        steps = {str(sae.name): at for g in self.groups for sae, at in zip(g.saes, g.stopped.tolist(), strict=True)}
        return {name: at for name, at in steps.items() if at >= 0}

    def dead(self, group: Group) -> list[float]:
        """Share of each SAE's latents that fired on none of the last `dead_rows` rows."""
        shares: list[float] = (group.silent >= self.dead_rows).double().mean(1).tolist()
        return shares

    # -- checkpoints

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"seen": self.seen}
        for index, group in enumerate(self.groups):
            tensors |= {f"{index}.{name}": tensor for name, tensor in group.bank.state().items()}
            tensors |= {f"{index}.{name}": getattr(group, name) for name in ("totals", "silent", "stopped")}
        return tensors

    def checkpoint(self, digest: str, metrics_bytes: int) -> Checkpoint:
        """All of it, for `restore`."""
        return Checkpoint(self.step, self.reader or {}, digest, metrics_bytes, self._tensors())

    def restore(self, saved: Checkpoint, digest: str) -> None:
        """Go to where a checkpoint was taken; raises IncompatibleError where it is another run's."""
        own = self._tensors()
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in saved.tensors.items()}
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        if saved.digest != digest or shapes != expected:
            raise IncompatibleError("The checkpoint in state/ belongs to another run than config.toml describes.")
        for name, tensor in own.items():
            tensor.copy_(saved.tensors[name])
        for index, group in enumerate(self.groups):
            group.bank.restore({name: saved.tensors[f"{index}.{name}"] for name in group.bank.state()})
        self.step, self.reader = saved.step, saved.reader

    # -- metrics

    def metrics(self, run: RunConfig) -> tuple[dict[str, Any], ...]:
        """A line an SAE for metrics.jsonl, over the batches since the last call, in the run's order.

        `mse` is per dimension and in the raw activations' units, as in eval.json; `loss` and `l1` are eq. 8's, on
        scaled inputs. Figures of a stopped SAE are null.
        """
        seen, spread = self.seen.tolist()
        lines = {}
        for group in self.groups:
            totals = zip(*group.totals.tolist(), strict=True)
            stopped = group.stopped.tolist()
            for sae, sums, dead, at in zip(group.saes, totals, self.dead(group), stopped, strict=True):
                lines[sae.name] = {
                    "step": self.step,
                    "rows": self.step * run.batch_size,
                    "sae": sae.name,
                    **self._figures(dict(zip(TOTALS, sums, strict=True)), seen, spread, dead, at),
                    "lr": cast(float, sae.lr) * lr_factor(run, self.step),
                    "l1_coefficient": sae.l1_coefficient * l1_factor(run, self.step),
                } | ({"stopped": at} if at >= 0 else {})
            group.totals.zero_()
        self.seen.zero_()
        return tuple(lines[sae.name] for sae in run.saes)

    def _figures(
        self, total: dict[str, float], rows: float, spread: float, dead: float, stopped: int
    ) -> dict[str, float | None]:
        keys = ("loss", "mse", "l1", "l0", "explained_variance", "gamma", "dead")
        if stopped >= 0:
            return dict.fromkeys(keys)
        d_in = len(self.centre)
        values = (
            total["loss"] / rows,
            total["squared_error"] / (rows * d_in * self.scale**2),
            total["l1"] / rows,
            total["l0"] / rows,
            1 - total["squared_error"] / spread if spread else None,
            total["norm"] / total["inner"] if total["inner"] else None,
            dead,
        )
        return dict(zip(keys, values, strict=True))
