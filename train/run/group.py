"""The SAEs of one shape during a run: their bank, what is counted about them, their position in the data.

A group is the unit of a run: it is trained by whichever process holds it, saves and resumes by itself, and nothing in
it depends on the others. What is counted is added up on the device and read only when a line of metrics is due. An
SAE whose loss is not finite keeps its slot and its weights of before, and is left out of every update and figure.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

from gsae.errors import IncompatibleError
from gsae.train.architectures.base import Params
from gsae.train.architectures.registry import FAST, PARAMS, initial, started_from
from gsae.train.sae import load_sae, weights_sha256
from gsae.train.step.adam import Adam
from gsae.train.step.autograd import AutogradBank
from gsae.train.step.bank import Bank
from gsae.train.step.stack import Figures

from .checkpoint import Checkpoint
from .config import RunConfig, SAEConfig
from .inputs import Inputs
from .lr_schedule import l1_factor, lr_factor, recovery, seed_at
from .resample import revived

DEAD_ROWS = 10_000_000  # a latent is dead once silent for this many training rows, or one epoch's if those are fewer
TOTALS = ("loss", "squared_error", "l1", "l0", "norm", "inner")
FIGURES = ("loss", "mse", "l1", "l0", "explained_variance", "gamma", "dead")
HELDOUT_ROWS_AT_ONCE = 512
Line = dict[str, Any]


class Group:
    """A group at some step. `totals` (len(TOTALS), saes) and `seen` are since the last line of metrics."""

    def __init__(self, number: int, saes: tuple[SAEConfig, ...], run: RunConfig, inputs: Inputs) -> None:
        """Group `number` of a resolved run at step 0."""
        self.number, self.saes, self.run, self.inputs = number, saes, run, inputs
        self.step = 0
        self.reader: dict[str, int] | None = None
        kind, d_sae, device, many = saes[0].kind, saes[0].d_sae, inputs.device, len(saes)
        self.bank: Any = bank_for(kind, [_start(sae, inputs) for sae in saes], run, inputs)
        self.lr = torch.tensor([cast(float, sae.lr) for sae in saes], device=device)
        self.l1 = torch.tensor([sae.l1_coefficient for sae in saes], dtype=torch.float64, device=device)
        self.dead_rows = min(DEAD_ROWS, inputs.summary.rows)
        self.totals = torch.zeros(len(TOTALS), many, dtype=torch.float64, device=device)
        self.seen = torch.zeros(2, dtype=torch.float64, device=device)  # rows, and the sum of ||z - mean||^2
        self.silent = torch.zeros(many, d_sae, dtype=torch.int64, device=device)  # rows since each latent fired
        self.stopped = torch.full((many,), -1, dtype=torch.int64, device=device)  # the step of a loss not finite
        self.resampled = torch.full((many,), -1, dtype=torch.int64, device=device)

    @property
    def names(self) -> list[str]:
        """The names of its SAEs."""
        return [str(sae.name) for sae in self.saes]

    def advance(self, x: Tensor, spread: Tensor, reader: dict[str, int]) -> None:
        """Take one step on x (rows, d_in), scaled and centred, whose sum of squares is `spread`.

        reader: the position in the data after it.
        """
        self.step += 1
        self.reader = reader
        run, step = self.run, self.step
        l1 = self.l1 * l1_factor(run, step)
        rates = torch.where(self.stopped < 0, self.lr * lr_factor(run, step), 0) * self._recovery(step)
        figures = self.bank.step(x, l1, Adam(rates, run.adam_betas[1], run.adam_eps, step))
        loss = figures.loss(l1)
        self.stopped.masked_fill_((self.stopped < 0) & ~torch.isfinite(loss), step)
        self.totals += torch.where(self.stopped < 0, _stacked(loss, figures), 0)
        self.silent.add_(len(x)).masked_fill_(figures.fired > 0, 0)
        self.seen += torch.stack([self.seen.new_tensor(len(x)), spread])

    def _recovery(self, step: int) -> Tensor | float:
        return recovery(self.run, step, self.resampled).to(self.lr) if self.run.resample_at else 1.0

    def resample(self, z: Tensor) -> dict[str, int]:
        """Give latents that are silent for long new directions among inputs z (rows, d_in); how many, by SAE."""
        counts = {}
        for index, sae in enumerate(self.saes):
            silent = self.silent[index] >= cast(int, self.run.resample_silent_rows)
            if int(self.stopped[index]) >= 0 or PARAMS[sae.kind].FROZEN or not bool(silent.any()):
                continue
            params = self._params(index)
            l1 = sae.l1_coefficient * l1_factor(self.run, self.step)
            seed = seed_at(sae.seed, self.step)
            found = revived(params, silent, z, l1, seed, zero_bias=self.run.resample_bias == "zero")
            if found is None:
                continue
            for name, values in found.values.items():
                self.bank.params[name][index, found.latents] = values
            self.bank.reset(index, found.latents)
            self.silent[index, found.latents] = 0
            self.resampled[index] = self.step
            counts[str(sae.name)] = len(found.latents)
        return counts

    def _params(self, index: int) -> Params:
        """A view of one SAE as it stands."""
        return PARAMS[self.saes[index].kind](**{name: tensor[index] for name, tensor in self.bank.params.items()})

    def failed(self) -> dict[str, int]:
        """The SAEs whose loss was not finite, with the step at which that was."""
        return failed(self.saes, self.stopped)

    def dead(self) -> list[float]:
        """Share of each SAE's latents that fired on none of the last `dead_rows` rows."""
        shares: list[float] = (self.silent >= self.dead_rows).double().mean(1).tolist()
        return shares

    # -- checkpoints

    def _counters(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("totals", "seen", "silent", "stopped", "resampled")}

    def _tensors(self) -> dict[str, Tensor]:
        return self._counters() | {f"bank.{name}": tensor for name, tensor in self.bank.state().items()}

    def checkpoint(self, metrics_bytes: int) -> Checkpoint:
        """All of it, for `restore`."""
        digest = self.inputs.site.store.digest
        return Checkpoint(self.step, self.reader or {}, digest, metrics_bytes, self._tensors())

    def restore(self, saved: Checkpoint) -> None:
        """Go to where a checkpoint was taken; raises IncompatibleError where it is another run's."""
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in saved.tensors.items()}
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in self._tensors().items()}
        if saved.digest != self.inputs.site.store.digest or shapes != expected:
            raise IncompatibleError("The checkpoint in state/ belongs to another run than config.toml describes.")
        for name, tensor in self._counters().items():
            tensor.copy_(saved.tensors[name])
        self.bank.restore({n.removeprefix("bank."): t for n, t in saved.tensors.items() if n.startswith("bank.")})
        self.step, self.reader = saved.step, saved.reader

    # -- metrics

    def metrics(self, heldout: Tensor | None) -> list[Line]:
        """A line an SAE for metrics.jsonl, over the batches since the last call.

        `mse` is in the raw activations' units, but per dimension where eval.json has the sum; `loss` and `l1` are
        eq. 8's, on scaled inputs. heldout: scaled rows (rows, d_in) on which to measure too. Figures of a stopped SAE
        are null.
        """
        rows, spread = self.seen.tolist()
        d_in = len(self.inputs.centre)
        lr = (self.lr * lr_factor(self.run, self.step) * self._recovery(self.step)).tolist()
        columns = zip(
            self.saes, zip(*self.totals.tolist(), strict=True), self.dead(), self.stopped.tolist(), lr, self.bank.paths,
            strict=True,
        )  # fmt: skip
        lines = []
        for index, (sae, sums, dead, stopped, rate, path) in enumerate(columns):
            total = dict(zip(TOTALS, sums, strict=True))
            figures = {
                "loss": total["loss"] / rows,
                "mse": total["squared_error"] / (rows * d_in * self.inputs.scale**2),
                "l1": total["l1"] / rows,
                "l0": total["l0"] / rows,
                "explained_variance": 1 - total["squared_error"] / spread if spread else None,
                "gamma": total["norm"] / total["inner"] if total["inner"] else None,
                "dead": dead,
            }
            line = {
                "step": self.step,
                "rows": self.step * self.run.batch_size,
                "sae": sae.name,
                **(figures if stopped < 0 else dict.fromkeys(FIGURES)),
                "lr": rate,
                "l1_coefficient": sae.l1_coefficient * l1_factor(self.run, self.step),
                "path": path,
            }
            if stopped >= 0:
                line["stopped"] = stopped
            elif heldout is not None:
                line["heldout"] = self._on(heldout, index)
            lines.append(line)
        self.totals.zero_()
        self.seen.zero_()
        return lines

    def _on(self, z: Tensor, index: int) -> dict[str, float | int | None]:
        """The figures of one SAE on scaled rows z (rows, d_in), from totals in float64."""
        params = self._params(index)
        sums = torch.zeros(4, dtype=torch.float64, device=z.device)
        for first in range(0, len(z), HELDOUT_ROWS_AT_ONCE):
            part = z[first : first + HELDOUT_ROWS_AT_ONCE]
            f = params.encode(part)
            x_hat = params.decode(f).double()
            x = part.double()
            sums += torch.stack([(f > 0).sum(), (x - x_hat).square().sum(), x_hat.square().sum(), (x_hat * x).sum()])
        l0, error, norm, inner = sums.tolist()
        spread = float((z.double() - z.double().mean(0)).square().sum())
        return {
            "rows": len(z),
            "l0": l0 / len(z),
            "mse": _finite(error / (z.numel() * self.inputs.scale**2)),
            "explained_variance": _finite(1 - error / spread) if spread else None,
            "gamma": _finite(norm / inner) if inner else None,
        }


def _finite(value: float) -> float | None:
    """A figure for JSON; an SAE may diverge after its last batch was good."""
    return value if math.isfinite(value) else None


def failed(saes: tuple[SAEConfig, ...], stopped: Tensor) -> dict[str, int]:
    """The SAEs that were stopped, with the step at which that was; stopped (saes,), -1 for those that run."""
    return {str(sae.name): at for sae, at in zip(saes, stopped.tolist(), strict=True) if at >= 0}


def bank_for(kind: str, start: list[Params], run: RunConfig, inputs: Inputs) -> Any:
    """The bank that trains SAEs of a kind: the fast one where there is one and gradients are not clipped."""
    operands = torch.bfloat16 if run.precision == "bfloat16" else torch.float32
    if kind in FAST and run.clip_grad_norm is None:
        return Bank(kind, start, inputs.centre, operands, inputs.device, screened=bool(run.screening))
    return AutogradBank(kind, start, inputs.centre, operands, inputs.device, run.clip_grad_norm)


def _start(sae: SAEConfig, inputs: Inputs) -> Params:
    d_in = len(inputs.centre)
    if sae.init is None:
        return initial(sae.kind, d_in, sae.d_sae, sae.seed, inputs.centre)
    if weights_sha256(sae.init) != sae.init_sha256:
        raise IncompatibleError(f"The weights in {sae.init} are others than when the run was begun.")
    trained = load_sae(sae.init)
    if (trained.d_in, trained.d_sae) != (d_in, sae.d_sae):
        raise IncompatibleError(
            f"{sae.init} has d_in {trained.d_in} and width {trained.d_sae}; {d_in} and {sae.d_sae} are asked for."
        )
    return started_from(sae.kind, trained.params, inputs.scale, sae.init)


def _stacked(loss: Tensor, figures: Figures) -> Tensor:
    return torch.stack([loss, *(getattr(figures, name) for name in TOTALS[1:])])
