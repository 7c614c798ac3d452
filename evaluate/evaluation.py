"""The eval.json of every SAE of a run: one pass over the held-out rows and one over their text.

All SAEs of a run share each batch of rows and the model's clean and ablated passes. Files hold nothing but
figures that follow from the SAE, the store and the model, so evaluating twice writes the same bytes.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from gsae.store import IncompatibleError, NotFoundError, Site, Store, StoreSet, UsageError, order
from gsae.train import SAE, load_sae

from .measurement import Measurement
from .metrics import ratio
from .splice import CrossEntropies, Losses, splice

BATCH_ROWS = 4096
HELD_OUT = 1

Figures = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is: rows or contexts done, of how many."""

    stage: Literal["rows", "contexts"]
    done: int
    total: int


Listen = Callable[[Progress], None]


def evaluate(
    run: Path,
    store: Store | StoreSet,
    losses: Losses | None,
    contexts: int | None,
    listen: Listen = lambda event: None,
    device: str = "cpu",
) -> list[Figures]:
    """Evaluate every SAE of a run on the held-out rows of `store`; write and return their eval.json.

    losses: the language model with the run's site, None to leave out what needs it. contexts: at most so many
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
    mean = store.site(name).moments.within(multiple).mean
    heldout = np.flatnonzero(store.split() == HELD_OUT).astype(np.int64)
    measured = Measurement(saes, mean, heldout, norm_limit, device)
    measure(measured, site, store.plan.context_size, listen)
    spliced = None
    if losses is not None:
        ran = some_contexts(heldout, store.plan.seed, contexts)
        found = splice_contexts(losses, saes, store, ran, mean, norm_limit, device, listen)
        spliced = Spliced(found, np.searchsorted(heldout, ran))
    results = [figures(one, saes[one], trained[one], measured, spliced) for one in saes]
    for folder, result in zip(folders, results, strict=True):
        write_json(folder / "eval.json", result)
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
    laid = order.permutation(len(heldout), seed, order.Stream.HELDOUT_CONTEXTS)
    return np.sort(heldout[laid[:contexts]])


def splice_contexts(
    losses: Losses,
    saes: Mapping[str, SAE],
    store: Store | StoreSet,
    contexts: NDArray[np.int64],
    mean: NDArray[np.float64],
    norm_limit: float,
    device: str,
    listen: Listen,
) -> CrossEntropies:
    """Run the language model over the contexts with these numbers."""
    plan = store.plan
    tokens = store.tokens()[contexts]
    return splice(
        losses,
        saes,
        tokens,
        order.row_mask(tokens, plan.tokenizer.excluded_ids, plan.dropped_positions),
        plan.tokenizer.excluded_ids,
        mean=mean,
        norm_limit=norm_limit,
        device=device,
        listen=lambda done: listen(Progress("contexts", done, len(contexts))),
    )


@dataclass(frozen=True)
class Spliced:
    """Cross-entropies, and where their contexts stand among the held-out contexts: (contexts run,)."""

    found: CrossEntropies
    places: NDArray[np.int64]

    def totals(self, name: str) -> Figures:
        """Return the mean cross-entropies in nats a token, and over how many."""
        tokens = int(self.found.tokens.sum())
        means = {key: ratio(float(sums.sum()), tokens) for key, sums in self._sums(name).items()}
        return {"contexts": len(self.places), "tokens": tokens, **means}

    def per_context(self, name: str, contexts: int) -> Figures:
        """Return sums for each of the held-out contexts, 0 for those that were not run."""
        columns = {"tokens": self.found.tokens, **self._sums(name)}
        return {key: finite(spread(column, self.places, contexts)) for key, column in columns.items()}

    def _sums(self, name: str) -> dict[str, NDArray[np.float64]]:
        found = self.found
        return {"clean": found.clean, "spliced": found.spliced[name], "zero": found.zero, "mean": found.mean}


def spread(values: NDArray[Any], places: NDArray[np.int64], n: int) -> NDArray[Any]:
    """Return an array (n,) with `values` at `places` and 0 elsewhere."""
    whole = np.zeros(n, values.dtype)
    whole[places] = values
    return whole


def finite(column: NDArray[Any]) -> list[Any] | None:
    """Return a column for JSON, None where an SAE that diverged left a value that is not finite."""
    return column.tolist() if np.isfinite(column).all() else None


def figures(name: str, sae: SAE, trained: Trained, measured: Measurement, spliced: Spliced | None) -> Figures:
    """Return the contents of an SAE's eval.json."""
    tally = measured.tallies[name]
    everything = tally.kept + tally.skipped
    contexts = len(measured.contexts)
    sums = dict.fromkeys(("tokens", "clean", "spliced", "zero", "mean"))
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
        "rows_skipped": tally.skipped.rows,
        "max_norm_multiple": trained.max_norm_multiple,
        **tally.kept.figures(),
        "dead": trained.dead,
        "silent": tally.silent,
        "dense": tally.dense,
        "all_rows": {"rows": everything.rows, **everything.figures()},
        "ce_loss_score": spliced and spliced.found.score(name),
        "ce_loss_score_mean": spliced and spliced.found.score_mean(name),
        "cross_entropy": spliced and spliced.totals(name),
        "per_context": {
            "rows": measured.inputs.rows.tolist(),
            "l0": tally.l0.tolist(),
            "sse": finite(tally.sse.numpy()),
            "sst": finite(measured.inputs.sst().numpy()),
            **(spliced.per_context(name, contexts) if spliced else sums),
        },
    }


def write_json(path: Path, value: Figures) -> None:
    """Write `value` with a line for each of its keys; the file is there whole or not at all."""
    lines = (f"{json.dumps(key)}: {json.dumps(part, allow_nan=False)}" for key, part in value.items())
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
