"""eval.json: what is measured of one SAE. The only place that knows its keys, for its writer and all its readers.

A value is null where it is not defined, such as a ratio with a denominator of 0, or where it was not measured. The keys
stand in the file in the order of the fields here. docs/evaluation.md defines each of them.
"""

import json
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from gsae.errors import CorruptError
from gsae.files import read_file, replace_text
from gsae.settings import Contract, first_fault

EVAL = "eval.json"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
Sums = list[int | float] | None
"""Sums by document: counts are integers, other sums are floats."""


class RowMetrics(Contract):
    """Metrics of one set of rows. x: a row. x_hat: its reconstruction. mu: the mean row of the set.

    l0: mean number of latents that are not 0. mse: mean of ||x - x_hat||^2, summed over dimensions as SAELens does.
    explained_variance: 1 - sum ||x - x_hat||^2 / sum ||x - mu||^2.
    gamma: E||x_hat||^2 / E[x_hat . x], below 1 for shrinkage (Rajamanoharan et al. 2024, eqs. 9-10).
    gamma_centred: the same for x - mu and x_hat - mu, because a large mean row hides shrinkage.
    cossim: mean of the cosine between x and x_hat. l2_ratio: mean of ||x_hat|| / ||x||.
    """

    l0: Number = None
    explained_variance: Number = None
    mse: Number = None
    gamma: Number = None
    gamma_centred: Number = None
    cossim: Number = None
    l2_ratio: Number = None


class RowCount(Contract):
    """rows: how many rows a set has."""

    rows: int


class BelowCut(RowCount):
    """norm_cut: rows of this norm or more are left out; None where none are."""

    norm_cut: Number = None


# Of several bases, pydantic takes the fields of the last one first.
class AllRows(RowMetrics, RowCount):
    """Metrics of every held-out row."""


class WithoutLargest(RowMetrics, BelowCut):
    """Metrics of every held-out row except the largest thousandth by norm."""


class Density(Contract):
    """How many latents fire on which share of the rows.

    log10_edges: edges of the bins, log10 of the share. latents: count of each bin. silent: latents that never fire.
    """

    log10_edges: list[float]
    latents: list[int]
    silent: int

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if len(self.log10_edges) != len(self.latents) + 1:
            raise ValueError("latents need one edge more than they have bins")
        return self


class AllPositions(Contract):
    """Cross-entropies in nats a token as SAELens computes them: over its tokens, with zero at all positions."""

    tokens: int | None = None
    ce_loss_without_sae: Number = None
    ce_loss_with_sae: Number = None
    ce_loss_with_ablation: Number = None


class LanguageModelLosses(Contract):
    """Mean cross-entropies and divergences of the language model, in nats a token, and over how much text."""

    contexts: int
    documents: int | None = None
    tokens: int | None = None
    ce_loss_without_sae: Number = None
    ce_loss_with_sae: Number = None
    ce_loss_with_ablation: Number = None
    ce_loss_with_mean_ablation: Number = None
    kl_div_with_sae: Number = None
    kl_div_with_ablation: Number = None
    kl_div_with_mean_ablation: Number = None
    all_positions: AllPositions | None = None


class PerDocument(Contract):
    """Sums over each held-out document, or over groups of neighbouring documents, for redrawing documents.

    A document that was not run through the language model has 0 in `tokens` and in the sums of losses and divergences.
    A column is None where it was not measured, or where one of its sums is not finite because the SAE diverged.
    """

    rows: Sums = None
    l0: Sums = None
    sse: Sums = None
    sst: Sums = None
    tokens: Sums = None
    clean: Sums = None
    spliced: Sums = None
    zero: Sums = None
    mean: Sums = None
    kl_spliced: Sums = None
    kl_zero: Sums = None


class Identity(Contract):
    """Which SAE was measured, and on which rows."""

    sae: str
    architecture: str
    d_in: int
    d_sae: int
    l1_coefficient: Number = None
    lr: Number = None
    seed: int | None = None
    site: str
    store_digest: str
    rows: int
    rows_skipped: int = 0
    max_norm_multiple: Number = None
    steps: int | None = None  # of the weights that were measured
    diverged: int | None = None  # step at which it diverged in training, and why
    diverged_because: str | None = None
    stopped: int | None = None  # step at which it was stopped for that


class Evaluation(RowMetrics, Identity):
    """The contents of eval.json. The row metrics at the top are those of the rows within the run's norm limit.

    heldout_documents: how many documents have rows; errors and intervals are over them. Older versions wrote sums by
    context, `per_context`, and neither this nor `per_document`: an interval cannot be computed from them.
    """

    dead: Number = None
    dead_rows: int | None = None
    silent: Number = None
    dense: Number = None
    density: Density | None = None
    all_rows: AllRows | None = None
    without_largest: WithoutLargest | None = None
    ce_loss_score: Number = None
    ce_loss_score_mean: Number = None
    ce_loss_score_all_positions: Number = None
    kl_div_score: Number = None
    language_model: LanguageModelLosses | None = None
    standard_errors: dict[str, Number] = Field(default_factory=dict)
    heldout_documents: int | None = None
    per_document: PerDocument | None = None


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Replace an eval.json, with one line for each key."""
    values = evaluation.model_dump()
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in values.items())
    replace_text(path, "{\n" + ",\n".join(lines) + "\n}\n", shared=True)


def read_evaluation(path: Path) -> Evaluation:
    """Read an eval.json. Raises NotFoundError where there is none, CorruptError naming the first wrong value."""
    data = read_file(path, "`gsae eval` writes it.")
    try:
        return Evaluation.model_validate_json(data)
    except ValidationError as error:
        raise CorruptError(f"{path}: {first_fault(error)}. Run `gsae eval` to write it again.") from error


def read_evaluations(run: Path) -> list[Evaluation]:
    """Read the eval.json of every SAE of a run, in the order of their folders' names."""
    return [read_evaluation(path) for path in sorted(run.glob(f"saes/*/{EVAL}"))]
