"""Whether an SAE still learns, by its own best figures, and the state that one which does not can go back to.

An SAE has diverged if its loss or a gradient is not finite, and at a line of metrics if its loss is over twice its
best, its explained variance .1 below its best, or .2 more of its latents silent than at its best. Lines are compared
from the end of both warm-ups on, when the penalty no longer changes, and not while the rate recovers from a resampling;
silent latents from where the rows they are counted over lie behind the warm-ups, in which nearly all latents fire.

Healthy weights are kept every `healthy_every` steps, whatever the checkpoints do, so that a run which is resumed goes
back to the same ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .metrics_line import MetricsLine

LOSS_MULTIPLE, VARIANCE_LOST, SILENT_GAINED = 2.0, 0.1, 0.2
MOST_RETRIES, RETRY_LR = 2, 1 / 3  # how often an SAE goes back, and the share of its rate that it goes on with
REASONS = (
    "",
    "its loss or a gradient is not finite",
    f"its loss is over {LOSS_MULTIPLE:g} times its lowest",
    f"its explained variance is {VARIANCE_LOST:g} below its highest",
    f"{SILENT_GAINED:g} more of its latents are silent than at the fewest",
)
NOT_FINITE = 1


@dataclass(frozen=True)
class Verdict:
    """An SAE diverged at `step`. action: "stop", "retry" or "continue". back_to: the step of the weights it has now."""

    step: int
    sae: str
    because: str
    action: str
    back_to: int


class Divergence:
    """What is known of the SAEs of a group: their best figures, when they diverged, and healthy weights, on the CPU."""

    def __init__(self, saes: int, healthy: Mapping[str, Tensor]) -> None:
        """healthy: the tensors (saes, ...) of step 0 that are kept; empty to keep none."""
        self.best = torch.full((3, saes), torch.inf, dtype=torch.float64)  # loss, -explained variance, silent share
        self.reason = torch.zeros(saes, dtype=torch.int64)  # of `REASONS`, when it last diverged
        self.at = torch.full((saes,), -1, dtype=torch.int64)  # the step of that
        self.retried = torch.full((saes, MOST_RETRIES), -1, dtype=torch.int64)  # steps after which it went back
        self.back_to = torch.full((saes, MOST_RETRIES), -1, dtype=torch.int64)  # and the steps it went back to
        self.healthy_at = torch.zeros(saes, dtype=torch.int64)  # the step of its healthy weights
        self.healthy = {name: tensor.detach().cpu().clone() for name, tensor in healthy.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold; the tensors themselves, not copies."""
        known = {name: getattr(self, name) for name in ("best", "reason", "at", "retried", "back_to", "healthy_at")}
        return known | {f"healthy.{name}": tensor for name, tensor in self.healthy.items()}

    def fault(self, index: int, line: MetricsLine, *, silent_known: bool) -> int:
        """Which rule an SAE breaks by its newest line, 0 for none; takes note of its best figures.

        silent_known: whether the share of silent latents is compared.
        """
        if line.loss is None or line.dead is None:
            return NOT_FINITE
        figures = torch.tensor(
            [
                line.loss,
                torch.nan if line.explained_variance is None else -line.explained_variance,
                line.dead if silent_known else torch.nan,
            ],
            dtype=torch.float64,
        )
        loss, variance, silent = self.best[:, index].tolist()
        limits = torch.tensor([LOSS_MULTIPLE * loss, variance + VARIANCE_LOST, silent + SILENT_GAINED])
        broken = (figures > limits).nonzero()[:, 0]
        if len(broken):
            return 2 + int(broken[0])
        torch.fmin(self.best[:, index], figures, out=self.best[:, index])  # NaN: not known
        return 0

    def forget_best(self, index: int) -> None:
        """Compare with later lines alone."""
        self.best[:, index] = torch.inf

    def retries(self, index: int) -> int:
        """How often an SAE went back."""
        return int((self.retried[index] >= 0).sum())

    def keep(self, index: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the weights of a healthy SAE."""
        for name, kept in self.healthy.items():
            kept[index].copy_(tensors[name][index])
        self.healthy_at[index] = step

    def note_retry(self, index: int, step: int) -> None:
        """Take note that an SAE goes back to its healthy weights."""
        turn = self.retries(index)
        self.retried[index, turn], self.back_to[index, turn] = step, self.healthy_at[index]
        self.forget_best(index)

    def history(self, index: int) -> dict[str, Any]:
        """What metrics, cfg.json and eval.json say of an SAE that ever diverged; empty for others."""
        if int(self.at[index]) < 0:
            return {}
        said: dict[str, Any] = {"diverged": int(self.at[index]), "diverged_because": REASONS[int(self.reason[index])]}
        pairs = zip(self.retried[index].tolist(), self.back_to[index].tolist(), strict=True)
        retries = [{"step": step, "back_to": back} for step, back in pairs if step >= 0]
        return said | ({"retries": retries} if retries else {})
