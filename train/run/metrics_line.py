"""One line of metrics.jsonl: the metrics of one SAE over the batches since its line before. Shared by all readers."""

from typing import Any, Self

from pydantic import model_validator

from gsae.settings import Contract


class _Metrics(Contract):
    @model_validator(mode="before")
    @classmethod
    def _per_dimension(cls, line: Any) -> Any:
        """Keep the `mse` of a line without `d_in`, of an earlier version of gsae, under a name that says what it is."""
        if isinstance(line, dict) and "mse" in line and "d_in" not in line:
            line = {"mse_per_dimension" if name == "mse" else name: value for name, value in line.items()}
        return line

    def noted(self) -> dict[str, Any]:
        """The fields that were set, for JSON."""
        return self.model_dump(exclude_unset=True)


class HeldoutMetrics(_Metrics):
    """Metrics on the first held-out rows, at the weights of that step."""

    rows: int
    d_in: int | None = None
    l0: float
    mse: float | None = None
    explained_variance: float | None = None
    gamma: float | None = None


class MetricsLine(_Metrics):
    """Metrics of one SAE at a step. Those from `loss` to `dead_rows` are None for an SAE that was stopped.

    A metric is None too if it is not defined, for example explained variance of rows that are all equal.
    """

    step: int
    rows: int | None = None  # trained on so far
    sae: str
    d_in: int | None = None
    loss: float | None = None  # of scaled inputs, with E||x||^2 = 1; Rajamanoharan et al. 2024, eq. 8 or 4
    mse: float | None = None  # mean over rows of ||x - x_hat||^2, in the units of the raw activations
    l1: float | None = None  # the penalty before its coefficient, of scaled inputs
    l0: float | None = None  # mean number of latents that fire
    explained_variance: float | None = None
    gamma: float | None = None  # sum ||x_hat||^2 / sum x_hat . x; 1 means no shrinkage
    dead: float | None = None  # share of latents that fired on none of the last `dead_rows` rows
    dead_rows: int | None = None  # the least of 1e7, the rows of an epoch, and the rows trained on so far
    lr: float | None = None
    l1_coefficient: float | None = None  # at this step, warm-up included
    path: str | None = None  # the step that the SAE takes next: dense or sparse
    stopped: int | None = None  # step at which it diverged and was stopped
    diverged: int | None = None  # step at which it last diverged (`divergence`), and why
    diverged_because: str | None = None
    retries: list[dict[str, int]] | None = None  # steps at which it went back, and the steps it went back to
    heldout: HeldoutMetrics | None = None

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read a line. Raises pydantic's ValidationError, a ValueError."""
        return cls.model_validate_json(text)
