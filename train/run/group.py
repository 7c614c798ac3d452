"""The SAEs of one shape during a run: their bank, what is counted about them, and their position in the data.

A group is the unit of a run: one process trains it, it saves and resumes by itself, and nothing in it depends on other
groups. Counts are added up on the device and read only when a line of metrics is due. An SAE that is stopped keeps its
place, and is left out of every update and metric.
"""

import math

import torch
from torch import Tensor

from gsae.errors import IncompatibleError
from gsae.train.architectures.base import Params
from gsae.train.architectures.registry import ARCHITECTURES
from gsae.train.sae import load_sae, weights_sha256
from gsae.train.step.adam import Adam
from gsae.train.step.bank import Bank, bank_for
from gsae.train.step.batch_sums import BatchSums
from gsae.train.step.step_graph import StepGraph
from gsae.train.step.wide import wide

from .checkpoint import Checkpoint
from .config import ResolvedRun, ResolvedSAE
from .divergence import MOST_RETRIES, NOT_FINITE, REASONS, RETRY_LR, Divergence, Verdict
from .inputs import Inputs
from .lr_schedule import l1_factor, lr_factor, recovery, seed_at
from .measuring import heldout_metrics, training_metrics
from .metrics_line import MetricsLine
from .replay import Batch, Unseen
from .resample import resampled

DEAD_ROWS = 10_000_000
DIVERGENCE = "divergence."  # what the names of its tensors in a checkpoint begin with
TOTALS = ("loss", "squared_error", "l1", "l0", "norm", "inner")


class Group:
    """A group at some step. `totals` (len(TOTALS), saes) and `seen` are sums since the last `reset_totals`."""

    def __init__(self, number: int, saes: tuple[ResolvedSAE, ...], run: ResolvedRun, inputs: Inputs) -> None:
        """Group `number` of a run at step 0."""
        self.number, self.saes, self.run, self.inputs = number, saes, run, inputs
        self.step = 0
        self.reader: dict[str, int] | None = None
        d_sae, device, many = saes[0].d_sae, inputs.device, len(saes)
        self.bank: Bank = bank_for(
            [_start(sae, run, inputs) for sae in saes],
            inputs.centre,
            device,
            operands=torch.bfloat16 if run.precision == "bfloat16" else torch.float32,
            clip=run.clip_grad_norm,
            screened=run.screening,
            tf32=run.precision == "tf32",
            kernels=run.kernels,
            sparse_share=run.sparse_share,
        )
        self.lr = torch.tensor([sae.lr for sae in saes], device=device)
        self.l1 = torch.tensor([sae.l1_coefficient for sae in saes], dtype=wide(device), device=device)
        self.totals = torch.zeros(len(TOTALS), many, dtype=wide(device), device=device)
        self.seen = torch.zeros(2, dtype=wide(device), device=device)  # rows, and the sum of ||z - mean||^2
        self.silent = torch.zeros(many, d_sae, dtype=torch.int64, device=device)  # rows since each latent fired
        self.stopped = torch.full((many,), -1, dtype=torch.int64, device=device)  # the step at which each was stopped
        self.resampled = torch.full((many,), -1, dtype=torch.int64, device=device)  # step of the last resampling
        self._graph = StepGraph(self._on_device) if run.cuda_graph else None
        self._unseen = Unseen(self._take, lambda step: self.bank.give_up(step, run.adam_betas[1]))
        self.divergence = Divergence(many, {} if run.on_divergence == "continue" else self._worth_keeping())
        self.shares = torch.ones(many, device=device)  # of the learning rates, after retries

    @property
    def names(self) -> list[str]:
        """The names of its SAEs."""
        return [sae.name for sae in self.saes]

    def advance(self, x: Tensor, spread: Tensor, reader: dict[str, int]) -> None:
        """Take one step on x (rows, d_in), scaled and centred.

        spread: the sum of squares of x. reader: the position in the data after it.
        """
        self.step += 1
        self.reader = reader
        self._unseen.add(Batch(self.step, x, spread))

    def _take(self, batch: Batch) -> Tensor | None:
        """Launch a step and add up its sums; returns whether it takes place, as `Bank.went`."""
        step, l1 = batch.step, self.l1 * l1_factor(self.run, batch.step)
        values = batch.x, batch.spread, self._rates(step), l1
        if self._graph is None:
            return self._on_device(*values, step)
        went = self._graph((len(batch.x), self.bank.paths), *values, torch.full_like(self.stopped[0], step))
        self.bank.look(step, len(batch.x))
        return went

    def _on_device(self, x: Tensor, spread: Tensor, rates: Tensor, l1: Tensor, step: int | Tensor) -> Tensor | None:
        run, rows = self.run, len(x)
        rates = torch.where(self.stopped < 0, rates, 0)
        sums = self.bank.step(x, l1, Adam(rates, run.adam_betas[1], run.adam_eps, step, run.row_clip))
        loss, fired, went = sums.loss(l1), sums.fired > 0, self.bank.went
        counted, seen = self.stopped < 0, torch.stack([torch.full_like(spread, rows), spread])
        if went is not None:
            counted, fired, seen = counted & went, fired & went, seen * went
        # In a CUDA graph the step is a tensor, for which masked_fill_ would wait.
        self.stopped.copy_(torch.where(counted & ~torch.isfinite(loss), step, self.stopped))
        self.totals += torch.where(counted & (self.stopped < 0), _stacked(loss, sums), 0)
        self.silent.add_(rows if went is None else went * rows).masked_fill_(fired, 0)
        self.seen += seen
        return went

    def _rates(self, step: int) -> Tensor:
        """The learning rates (saes,) at a step, those of SAEs that were stopped too."""
        rates = self.lr * self.shares * lr_factor(self.run, step)
        return rates * recovery(self.run, step, self.resampled).to(rates) if self.run.resample_at else rates

    def resample(self, z: Tensor) -> dict[str, int]:
        """Give silent latents new directions among inputs z (rows, d_in). Returns how many, by SAE."""
        self._unseen.settle()
        counts = {}
        limit = (self.run.resample_norm_multiple or math.inf) * self.inputs.summary.median_norm * self.inputs.scale
        for index, sae in enumerate(self.saes):
            silent = self.silent[index] >= self.run.silent_rows
            if int(self.stopped[index]) >= 0 or sae.architecture.FROZEN or not bool(silent.any()):
                continue
            l1 = sae.l1_coefficient * l1_factor(self.run, self.step)
            seed = seed_at(sae.seed, self.step)
            zero_bias = self.run.resample_bias == "zero"
            found = resampled(self.params(index), silent, z, l1, seed, zero_bias=zero_bias, norm_limit=limit)
            if found is None:
                continue
            for name, values in found.values.items():
                self.bank.params[name][index, found.latents] = values
            self.bank.reset(index, found.latents)
            self.silent[index, found.latents] = 0
            self.resampled[index] = self.step
            counts[sae.name] = len(found.latents)
        return counts

    def params(self, index: int) -> Params:
        """A view of one SAE as it is now."""
        return self.saes[index].architecture(**{name: tensor[index] for name, tensor in self.bank.params.items()})

    def failed(self) -> dict[str, int]:
        """The SAEs that were stopped, and the step at which that was."""
        return failed(self.saes, self.stopped)

    @property
    def dead_rows(self) -> int:
        """Rows without a firing after which a latent is dead: 10 million, an epoch's, or all so far, what is least."""
        return min(self._most_dead_rows, max(1, self.step * self.run.batch_size))

    @property
    def _most_dead_rows(self) -> int:
        return min(DEAD_ROWS, self.inputs.summary.rows)

    def dead(self) -> list[float]:
        """Share of the latents of each SAE that fired on none of the last `dead_rows` rows."""
        shares: list[float] = (self.silent >= self.dead_rows).cpu().double().mean(1).tolist()
        return shares

    # -- SAEs that diverge

    def judge(self, lines: list[MetricsLine]) -> list[Verdict]:
        """Deal with SAEs that diverged since the lines before, by their newest lines; keep healthy weights if due."""
        found = []
        for index, line in enumerate(lines):
            if self._is_settled(index):
                continue
            reason = self._fault(index, line)
            if reason:
                found.append(self._diverged(index, reason))
            elif self.run.due(self.run.healthy_every, self.step):
                self.divergence.keep(index, self.step, self.bank.state())
        return found

    def _is_settled(self, index: int) -> bool:
        """Whether all is done about an SAE that diverged."""
        known, stopped = int(self.divergence.at[index]), int(self.stopped[index])
        return known >= 0 and (known == stopped or (self.run.on_divergence == "continue" and stopped < 0))

    def _fault(self, index: int, line: MetricsLine) -> int:
        if int(self.stopped[index]) >= 0:
            return NOT_FINITE
        first, resampled = self.step - self.run.log_every, int(self.resampled[index])
        if resampled >= 0 and first < resampled + self.run.resample_warm_up_steps:
            self.divergence.forget_best(index)
            return 0
        risen = max(self.run.lr_warm_up_steps, self.run.l1_warm_up_steps)
        counted = (self.step - risen) * self.run.batch_size >= self._most_dead_rows
        return self.divergence.fault(index, line, silent_known=counted) if first >= risen else 0

    def _diverged(self, index: int, reason: int) -> Verdict:
        known, action = self.divergence, self.run.on_divergence
        in_vain = known.retries(index) == MOST_RETRIES or self.step == self.run.steps
        if (action == "retry" and in_vain) or (action == "continue" and reason == NOT_FINITE):
            action = "stop"
        known.reason[index] = reason
        known.at[index] = int(self.stopped[index]) if reason == NOT_FINITE else self.step
        if action == "stop":
            self.stopped[index] = int(known.at[index])
        if action == "retry":
            self.stopped[index] = -1
            known.note_retry(index, self.step)
        if action != "continue" and known.healthy:
            self._go_back(index)
        return Verdict(
            int(known.at[index]), self.saes[index].name, REASONS[reason], action, int(known.healthy_at[index])
        )

    def _go_back(self, index: int) -> None:
        """Give an SAE its healthy weights; its second moments, which remember the divergence, start again."""
        state = self.bank.state()
        for name, kept in self.divergence.healthy.items():
            state[name][index].copy_(kept[index])
        self.bank.reset(index, torch.arange(self.saes[index].d_sae, device=self.inputs.device))
        self.silent[index] = 0
        self._share_rates()

    def _share_rates(self) -> None:
        self.shares.copy_(RETRY_LR ** (self.divergence.retried >= 0).sum(1))

    def _worth_keeping(self) -> dict[str, Tensor]:
        """What an SAE that diverges goes back to: its parameters, and the second moments of b_dec."""
        state = self.bank.state()
        return {name: state[name] for name in (*self.bank.params, "b_dec.second_moment") if name in state}

    # -- checkpoints

    def _counters(self) -> dict[str, Tensor]:
        counted = {name: getattr(self, name) for name in ("totals", "seen", "silent", "stopped", "resampled")}
        return counted | {f"{DIVERGENCE}{name}": tensor for name, tensor in self.divergence.tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        return self._counters() | {f"bank.{name}": tensor for name, tensor in self.bank.state().items()}

    def checkpoint(self, metrics_bytes: int) -> Checkpoint:
        """Everything that `restore` needs."""
        self._unseen.settle()
        digest = self.inputs.site.store.digest
        return Checkpoint(self.step, self.reader or {}, digest, metrics_bytes, self._tensors())

    def restore(self, saved: Checkpoint) -> None:
        """Go to where a checkpoint was taken. Raises IncompatibleError if it is that of another run."""
        # Earlier versions noted nothing about divergence.
        own = self._tensors()
        found = {name: tensor for name, tensor in own.items() if name.startswith(DIVERGENCE)} | saved.tensors
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        if saved.digest != self.inputs.site.store.digest or shapes != expected:
            raise IncompatibleError("The checkpoint in state/ belongs to another run than config.toml describes.")
        for name, tensor in self._counters().items():
            tensor.copy_(found[name])
        self._share_rates()
        self.bank.restore({n.removeprefix("bank."): t for n, t in saved.tensors.items() if n.startswith("bank.")})
        self.step, self.reader = saved.step, saved.reader

    # -- metrics

    def lines(self, heldout: Tensor | None) -> list[MetricsLine]:
        """A line for each SAE, over the batches since the last `reset_totals`.

        heldout: scaled rows (rows, d_in) to measure on too, if given.
        """
        rows, spread = self.seen.tolist()
        d_in, scale = len(self.inputs.centre), self.inputs.scale
        rates = self._rates(self.step).tolist()
        dead, stopped = self.dead(), self.stopped.tolist()
        lines = []
        for index, (sae, sums) in enumerate(zip(self.saes, zip(*self.totals.tolist(), strict=True), strict=True)):
            metrics = training_metrics(dict(zip(TOTALS, sums, strict=True)), rows, spread, scale) | {
                "dead": dead[index],
                "dead_rows": self.dead_rows,
            }
            line = {
                "step": self.step,
                "rows": self.step * self.run.batch_size,
                "sae": sae.name,
                "d_in": d_in,
                **(metrics if stopped[index] < 0 else dict.fromkeys(metrics)),
                "lr": rates[index],
                "l1_coefficient": sae.l1_coefficient * l1_factor(self.run, self.step),
                "path": self.bank.paths[index],
            }
            if stopped[index] >= 0:
                line["stopped"] = stopped[index]
            elif heldout is not None:
                line["heldout"] = heldout_metrics(self.params(index), heldout, scale)
            lines.append(MetricsLine.model_validate(line))
        return lines

    def judged_lines(self, heldout: Tensor | None) -> tuple[list[MetricsLine], list[Verdict]]:
        """The `lines` of a step, after which new sums begin, and what became of SAEs that diverged."""
        self._unseen.settle()
        lines = self.lines(heldout)
        verdicts = self.judge(lines)
        self.reset_totals()
        histories = [self.divergence.history(index) for index in range(len(self.saes))]
        return [line.model_copy(update=more) for line, more in zip(lines, histories, strict=True)], verdicts

    def reset_totals(self) -> None:
        """Begin the sums of the next lines."""
        self.totals.zero_()
        self.seen.zero_()


def failed(saes: tuple[ResolvedSAE, ...], stopped: Tensor) -> dict[str, int]:
    """The SAEs that were stopped, and the step at which that was; stopped (saes,): -1 for those that run."""
    return {sae.name: at for sae, at in zip(saes, stopped.tolist(), strict=True) if at >= 0}


def _start(sae: ResolvedSAE, run: ResolvedRun, inputs: Inputs) -> Params:
    """The SAE at step 0: from its seed, or from the saved SAE in `init`."""
    d_in, architecture = len(inputs.centre), ARCHITECTURES[sae.kind]
    if sae.init is None:
        norm = min(1.0, 2 * d_in / sae.d_sae) if run.encoder_start == "scaled" else 1.0
        return architecture.initial(d_in, sae.d_sae, sae.seed, inputs.centre, norm)
    if weights_sha256(sae.init) != sae.init_sha256:
        raise IncompatibleError(f"The weights in {sae.init} have changed since the run was started.")
    trained = load_sae(sae.init)
    if (trained.d_in, trained.d_sae) != (d_in, sae.d_sae):
        raise IncompatibleError(
            f"{sae.init} has d_in {trained.d_in} and width {trained.d_sae}; {d_in} and {sae.d_sae} are needed."
        )
    start = architecture.from_saved(trained.params)
    if start is None:
        raise IncompatibleError(
            f"A {sae.kind} SAE cannot start from {sae.init}, which has {', '.join(vars(trained.params))}."
        )
    start = start.with_unit_rows()
    missing = (~torch.isfinite(start.W_dec).all(1)).nonzero()[:, 0]
    if len(missing):
        raise IncompatibleError(
            f"{len(missing)} of the {sae.d_sae} rows of W_dec in {sae.init} are zero or not finite, the first that of "
            f"latent {missing[0]}; training needs a direction for each."
        )
    return start.unfolded(inputs.scale)


def _stacked(loss: Tensor, batch: BatchSums) -> Tensor:
    return torch.stack([loss, *(getattr(batch, name) for name in TOTALS[1:])])
