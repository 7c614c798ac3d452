"""The eval.json of every SAE of a run: two passes over the held-out rows and one over their text.

All SAEs of a run share each batch of rows and the model's clean and ablated passes. Files hold nothing but
figures that follow from the SAE, the store and the model, so evaluating twice writes the same bytes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from gsae.errors import IncompatibleError, NotFoundError, UsageError
from gsae.files import replace_text
from gsae.store import Site, Store, StoreSet, Stream, permutation, row_mask
from gsae.train import SAE, load_sae

from .measurement import Measurement, Tally
from .norms_pass import survey
from .ratio_errors import Estimate, ratio_of_sums
from .splice import CLEAN, EVERYWHERE, MEAN, ZERO, Effects, Spliced, splice

BATCH_ROWS = 4096
HELD_OUT = 1
GROUP_TOKENS = 2048  # of one forward pass
MAX_SUMS = 2048  # sums by context in eval.json; more contexts than that are added up in groups of neighbours
SCORES = ("ce_loss_score", "ce_loss_score_mean", "ce_loss_score_all_positions", "kl_div_score")

Figures = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """How far it is: rows, contexts or latents done, of how many; of which SAE, where each has passes of its own."""

    stage: Literal["norms", "rows", "contexts", "activations", "latents", "export"]
    done: int
    total: int
    sae: str | None = None


Listen = Callable[[Progress], None]


def evaluate(
    run: Path,
    store: Store | StoreSet,
    effects: Effects | None,
    contexts: int | None,
    listen: Listen = lambda event: None,
    device: str = "cpu",
) -> list[Figures]:
    """Evaluate every SAE of a run on the held-out rows of `store`; write and return their eval.json.

    effects: the language model with the run's site, None to leave out what needs it. contexts: at most so many
    held-out contexts are run through it, None for all. device: where the SAEs run.

    Raises NotFoundError (no SAEs, or the store lacks their site), IncompatibleError (trained from another
    store, or SAEs that cannot share one pass), UsageError (no held-out rows, or contexts below 1).
    """
    if contexts is not None and contexts < 1:
        raise UsageError(f"contexts is {contexts}: at least 1 held-out context is needed.")
    folders = sae_folders(run)
    saes = {folder.name: load_sae(folder).to(device) for folder in folders}
    trained = {folder.name: Trained.of(folder, saes[folder.name]) for folder in folders}
    name, multiple, norm_limit = common_input(run, trained, store)
    site = store.site(name, split="heldout")
    if site.rows == 0:
        raise UsageError(f"{store.name} has no held-out rows to evaluate on. Harvest with --heldout above 0.")
    heldout = np.flatnonzero(store.split() == HELD_OUT).astype(np.int64)
    seen = survey(site, norm_limit, BATCH_ROWS, lambda done: listen(Progress("norms", done, site.rows)))
    measured = Measurement(saes, seen.mean, heldout, norm_limit, seen.norm_cut, device)
    measure(measured, site, store.plan.context_size, listen)
    spliced = ran = None
    if effects is not None:
        chosen = some_contexts(heldout, store.plan.seed, contexts)
        ran = np.searchsorted(heldout, chosen)
        mean = store.site(name).moments.within(multiple).mean
        spliced = splice_contexts(effects, saes, store, chosen, mean, norm_limit, device, listen)
    results = []
    for folder in folders:
        one = folder.name
        result = figures(one, saes[one], trained[one], measured, seen.norm_cut, spliced)
        results.append(result | {"per_context": per_context(one, measured, spliced, ran)})
        write_json(folder / "eval.json", results[-1])
    return results


def sae_folders(run: Path) -> list[Path]:
    """Return the folders of a run's SAEs by name; NotFoundError where there are none."""
    folders = sorted(path.parent for path in run.glob("saes/*/cfg.json"))
    if not folders:
        raise NotFoundError(f"{run} has no SAEs under saes/. Run `gsae train` with --out {run} first.")
    return folders


class Trained(BaseModel):
    """What an evaluation needs of what training noted in an SAE's cfg.json."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    architecture: str
    l1_coefficient: float | None
    lr: float | None
    seed: int | None
    site: str
    store_digest: str
    max_norm_multiple: float
    norm_limit: float | None  # None: no limit
    dead: float | None = None

    @classmethod
    def of(cls, folder: Path, sae: SAE) -> "Trained":
        """Read it; IncompatibleError for an SAE of which this is not known."""
        try:
            return cls.model_validate(dict(sae.metadata))
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise IncompatibleError(
                f"{folder / 'cfg.json'} does not say how its SAE was trained: metadata.gsae.{where}: {fault['msg']}."
            ) from None

    @property
    def input(self) -> tuple[str, float, float]:
        """Site, norm multiple and norm limit: equal for SAEs that can share passes."""
        return self.site, self.max_norm_multiple, inf if self.norm_limit is None else self.norm_limit


def common_input(run: Path, trained: Mapping[str, Trained], store: Store | StoreSet) -> tuple[str, float, float]:
    """Return the `input` of all SAEs of a run.

    Raises IncompatibleError where they differ, or were trained from another store than this.
    """
    for name, one in trained.items():
        if one.store_digest != store.digest:
            raise IncompatibleError(
                f"{name} of {run} was trained from a store with digest {one.store_digest}, but that of "
                f"{store.name} is {store.digest}.\nPass the store that it was trained from."
            )
    sizes = {each.plan.context_size for each in (store.stores if isinstance(store, StoreSet) else [store])}
    if len(sizes) > 1:
        raise IncompatibleError(
            f"Stores of one context size are evaluated together; {store.name} have {sorted(sizes)}."
        )
    inputs = {one.input: name for name, one in trained.items()}
    if len(inputs) > 1:
        (a, first), (b, second) = list(inputs.items())[:2]
        raise IncompatibleError(
            f"SAEs of one run need one site and one norm limit: {first} of {run} has {a}, {second} has {b}."
        )
    return next(iter(inputs))


def site_of(run: Path) -> str:
    """Return the site that a run's SAEs were trained on, for whoever loads the language model."""
    folder = sae_folders(run)[0]
    return Trained.of(folder, load_sae(folder)).site


def measure(measured: Measurement, site: Site, context_size: int, listen: Listen) -> None:
    """Count every held-out row."""
    done = 0
    for sources, x in site.in_order(BATCH_ROWS):
        measured.add(x, sources // context_size)
        done += len(x)
        listen(Progress("rows", done, site.rows))


def some_contexts(heldout: NDArray[np.int64], seed: int, contexts: int | None) -> NDArray[np.int64]:
    """Return at most `contexts` of the held-out contexts, ascending: the first in the order of their rows."""
    laid = permutation(len(heldout), seed, Stream.HELDOUT_CONTEXTS)
    return np.sort(heldout[laid[:contexts]])


def splice_contexts(
    effects: Effects,
    saes: Mapping[str, SAE],
    store: Store | StoreSet,
    contexts: NDArray[np.int64],
    mean: NDArray[np.float64],
    norm_limit: float,
    device: str,
    listen: Listen,
) -> Spliced:
    """Run the language model over the contexts with these numbers, a group at a time."""
    plan, parts = store.plan, []
    size = max(1, GROUP_TOKENS // plan.context_size)
    for first in range(0, len(contexts), size):
        group = contexts[first : first + size]
        tokens = store.tokens_around(group * plan.context_size, 0, plan.context_size - 1)
        stored = row_mask(tokens, plan.tokenizer.excluded_ids, plan.dropped_positions)
        special = plan.tokenizer.excluded_ids
        parts.append(splice(effects, saes, tokens, stored, special, mean=mean, norm_limit=norm_limit, device=device))
        listen(Progress("contexts", first + len(group), len(contexts)))
    return Spliced.joined(parts)


def figures(
    name: str, sae: SAE, trained: Trained, measured: Measurement, norm_cut: float, spliced: Spliced | None
) -> Figures:
    """Return the contents of an SAE's eval.json, sums by context excepted."""
    tally = measured.tallies[name]
    estimates = of_rows(measured, tally) | (of_the_model(spliced, name) if spliced else {})
    return {
        "sae": name,
        "architecture": trained.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "l1_coefficient": trained.l1_coefficient,
        "lr": trained.lr,
        "seed": trained.seed,
        "site": trained.site,
        "store_digest": trained.store_digest,
        "rows": tally.kept.rows,
        "rows_skipped": tally.all.rows - tally.kept.rows,
        "max_norm_multiple": trained.max_norm_multiple,
        **tally.kept.figures(),
        "dead": trained.dead,
        "silent": tally.silent,
        "dense": tally.dense,
        "density": tally.density(),
        "all_rows": {"rows": tally.all.rows, **tally.all.figures()},
        "without_largest": {
            "rows": tally.below_cut.rows,
            "norm_cut": norm_cut if isfinite(norm_cut) else None,
            **tally.below_cut.figures(),
        },
        **{key: estimates[key].value if key in estimates else None for key in SCORES},
        "language_model": spliced and language_model(spliced, name),
        "standard_errors": {key: estimate.error for key, estimate in estimates.items()},
    }


def of_rows(measured: Measurement, tally: Tally) -> dict[str, Estimate]:
    """Return figures of the kept rows that are ratios of sums by context."""
    inputs, sums = measured.inputs.columns, tally.sums.columns
    return {
        "l0": ratio_of_sums(sums["l0"], inputs["rows"]),
        "explained_variance": ratio_of_sums(sums["sse"], inputs["sst"]).complement(),
        "mse": ratio_of_sums(sums["sse"], inputs["rows"]),
        "gamma": ratio_of_sums(sums["square"], sums["cross"]),
    }


def of_the_model(spliced: Spliced, name: str) -> dict[str, Estimate]:
    """Return what the language model makes of an SAE, in the order of eval.json."""
    scores = {
        "ce_loss_score": spliced.score(name),
        "ce_loss_score_mean": spliced.score(name, MEAN),
        "ce_loss_score_all_positions": spliced.score(name, EVERYWHERE),
        "kl_div_score": spliced.divergence_score(name),
    }
    return scores | spliced.means(name)


def language_model(spliced: Spliced, name: str) -> Figures:
    """Return mean losses and divergences in nats a token, and over how many."""
    return {
        "contexts": len(spliced.tokens),
        "tokens": int(spliced.tokens.sum()),
        **{key: estimate.value for key, estimate in spliced.means(name).items()},
        "all_positions": {
            "tokens": int(spliced.tokens_after.sum()),
            **{key: estimate.value for key, estimate in spliced.means_after(name).items()},
        },
    }


def per_context(
    name: str, measured: Measurement, spliced: Spliced | None, ran: NDArray[np.int64] | None
) -> dict[str, list[Any] | None]:
    """Return sums of at most `MAX_SUMS` groups of neighbouring held-out contexts, for redrawing them.

    ran: (contexts run,) where the contexts that went through the language model stand; others count 0 there.
    """
    contexts = len(measured.contexts)
    columns = {**measured.inputs.columns, **measured.tallies[name].sums.columns}
    columns = {key: columns[key] for key in ("rows", "l0", "sse", "sst")}
    model: dict[str, NDArray[Any] | None] = dict.fromkeys(("tokens", "clean", "spliced", "zero", "mean"))
    if spliced is not None and ran is not None:
        at = {"clean": CLEAN, "spliced": spliced.condition(name), "zero": ZERO, "mean": MEAN}
        model |= {"tokens": spread(spliced.tokens, ran, contexts)}
        model |= {key: spread(spliced.loss[row], ran, contexts) for key, row in at.items()}
    whole = {"rows", "l0", "tokens"}  # counts
    return {
        key: None if column is None else grouped(column.astype(np.int64) if key in whole else column)
        for key, column in (columns | model).items()
    }


def spread(values: NDArray[Any], places: NDArray[np.int64], n: int) -> NDArray[Any]:
    """Return an array (n,) with `values` at `places` and 0 elsewhere."""
    whole = np.zeros(n, values.dtype)
    whole[places] = values
    return whole


def grouped(column: NDArray[Any]) -> list[Any] | None:
    """Return the sums of groups of a column for JSON, None where one is not finite (an SAE that diverged)."""
    groups = min(len(column), MAX_SUMS)
    sums = np.add.reduceat(column, np.arange(groups) * len(column) // groups)
    return sums.tolist() if np.isfinite(sums).all() else None


def write_json(path: Path, value: Figures) -> None:
    """Write `value` with a line for each of its keys; the file is there whole or not at all."""
    lines = (f"{json.dumps(key)}: {json.dumps(part, allow_nan=False)}" for key, part in value.items())
    replace_text(path, "{\n" + ",\n".join(lines) + "\n}\n", shared=True)
