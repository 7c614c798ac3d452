"""The harvest: tokens first, then the plan, then one window after another (`windows.py`), then the manifest.

Published files never change, so a harvest may be killed at any moment; the same command continues at the first window
without a record. Several workers each make their share of the windows (`workers.py`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gsae.errors import IncompatibleError
from gsae.files import TMP, sweep
from gsae.store import (
    CONFIRMED,
    ContextsSpec,
    DatasetSource,
    Plan,
    Store,
    WindowTotals,
    all_windows,
    is_complete,
    nonfinite_note,
    open_store,
    read_contexts,
    read_plan,
    read_tokens,
    unfinished,
    write_confirmed,
    write_manifest,
    write_plan,
)

from .batch_size import choose_batch_size
from .config import HarvestConfig
from .cost_estimate import check_room
from .events import Finished, Listen, Noted, StageStarted, WorkerDone
from .model.capture import LanguageModel
from .model.confirm import passed_tests
from .model.loading import cpu_threads, load_configured
from .model.overflow import confirm_loaded
from .model.torch_compile import compile_layers
from .nonfinite import NonfiniteRows
from .plans import make_plan, model_source
from .request import Request, make_request
from .resume_check import check_same_plan
from .row_layouts import RowLayouts, row_layouts
from .token_files import write_tokens
from .windows import due_windows, make_windows
from .workers import ALONE, Worker, device_of

# What a harvest that was killed before it had a plan may have left in its folder.
BEFORE_THE_PLAN = {"contexts", "documents", "tokens", CONFIRMED, TMP}
# How long a worker without windows waits for the others, so that it can publish the manifest.
PATIENCE_SECONDS, POLL_SECONDS = 10.0, 0.25

Tokens = NDArray[np.int32]
Load = Callable[[HarvestConfig], LanguageModel]


def harvest(
    config: HarvestConfig,
    out: Path,
    listen: Listen = lambda event: None,
    load: Load = load_configured,
    worker: Worker = ALONE,
) -> Store | None:
    """Make the store `out`, or continue with it, and return it; None if windows of other workers are missing.

    load: loads the language model that the settings name. worker: which of several workers this is. Each worker may be
    run again at any time; the run that finds no window missing publishes the store.

    Raises IncompatibleError if `out` holds something else or was begun with other settings, SpaceError if the disk or
    the memory is full, and the errors of text, tokenizer, model and sites. Windows published before an error are kept,
    and the same call continues after them.
    """
    config = config.model_copy(update={"device": device_of(config.device, worker, torch.cuda.device_count())})
    with cpu_threads(config.threads):
        begun, request = _open(config, out, runs_model=True)
        if is_complete(out):
            return _already_complete(out, listen)
        _warn(request, listen)
        sweep(out)
        if begun is None:
            plan, made = _begin(request, out, listen, load, worker)
        else:
            plan, made = _resume(begun, request, out, listen, load, worker)
        return _finish(plan, made, out, listen, worker)


def harvest_tokens(config: HarvestConfig, out: Path, listen: Listen = lambda event: None) -> None:
    """Write only the tokens of the store `out`; `harvest` continues with them, on this machine or another.

    Needs the model's config and tokenizer, and no weights. Raises the same errors as `harvest`.
    """
    begun, request = _open(config, out, runs_model=False)
    _warn(request, listen)
    if begun is None:
        sweep(out)
        _write_tokens(request, out, listen)
        sweep(out)
        made = read_tokens(out)[1]
        _note_nothing_held_out(request, made.heldout_rows if made else None, listen)


def _warn(request: Request, listen: Listen) -> None:
    if request.warning:
        listen(Noted(request.warning))


def _open(config: HarvestConfig, out: Path, runs_model: bool) -> tuple[Plan | None, Request]:
    """Return the plan on disk, None if there is none, and the request, after checking that both agree."""
    begun = read_plan(out)
    if begun is None:
        _check_empty(out)
    request = make_request(config, runs_model, _finished_text(begun, out))
    if begun is not None:
        check_same_plan(begun, request, None, out)
    return begun, request


def _finished_text(begun: Plan | None, out: Path) -> DatasetSource | None:
    """Return the text that the tokens on disk were made from, None if they are not finished."""
    if begun is not None:
        return begun.dataset
    tokens, made = read_tokens(out)
    return tokens.dataset if tokens and made else None


@dataclass(frozen=True)
class Made:
    """The windows that this call made. totals: of those that are the plan's first ones."""

    windows: int
    totals: WindowTotals


def _begin(request: Request, out: Path, listen: Listen, load: Load, worker: Worker) -> tuple[Plan, Made]:
    """Write the tokens, the plan and this worker's windows; return the plan and the windows."""
    if request.config.rows is not None:
        check_room(request, request.config.rows, out)
    contexts = _write_tokens(request, out, listen)
    tokens, split = read_contexts(out, contexts)
    layouts = row_layouts(request, tokens, split)
    _note_nothing_held_out(request, layouts.heldout.rows, listen)
    check_room(request, layouts.rows, out)
    lm = _load(request, load, listen)
    plan = _publish_plan(request, lm, contexts, layouts, tokens, out, listen)
    return plan, _make_due_windows(plan, request, layouts, tokens, lm, out, listen, worker)


def _resume(begun: Plan, request: Request, out: Path, listen: Listen, load: Load, worker: Worker) -> tuple[Plan, Made]:
    """Make the windows of this worker that are missing; return the plan and the windows."""
    if not due_windows(begun, out, worker):
        return begun, Made(0, WindowTotals(begun))
    tokens, split = read_contexts(out, begun.contexts)
    layouts = row_layouts(request, tokens, split)
    missing = unfinished(out, begun)  # of all workers, because they share the disk
    check_room(request, sum(layouts.of(name).window(number).rows for name, number in missing), out)
    lm = _load(request, load, listen)
    check_same_plan(begun, request, model_source(lm), out)
    write_plan(out, begun)  # the process that began may have been killed before all metadata was published
    return begun, _make_due_windows(begun, request, layouts, tokens, lm, out, listen, worker)


def _finish(plan: Plan, made: Made, out: Path, listen: Listen, worker: Worker) -> Store | None:
    """Publish the manifest and return the store; None if windows of other workers are missing."""
    if worker.world_size > 1 and (missing := _wait_for_others(out, plan)):
        listen(WorkerDone(made.windows, missing))
        return None
    listen(StageStarted("writing the manifest"))
    write_manifest(out, plan, totals=made.totals)
    sweep(out)
    listen(Finished(made.windows))
    store = open_store(out)
    _note_nonfinite(store, listen)
    return store


def _write_tokens(request: Request, out: Path, listen: Listen) -> ContextsSpec:
    listen(StageStarted("reading the text"))
    return write_tokens(request, out, listen, lambda: listen(StageStarted("waiting for another worker's tokens")))


def _note_nothing_held_out(request: Request, heldout_rows: int | None, listen: Listen) -> None:
    """Note that nothing is held out, before the model runs; heldout_rows: None if another worker knows them."""
    if request.config.heldout_share and heldout_rows == 0:
        listen(
            Noted(
                "No rows are held out for evaluation. Whole documents are held out, a share of "
                f"{request.config.heldout_share:g}, and the text has too few. Use more documents, a larger "
                "--heldout or another --seed; with --heldout 0 this is not noted."
            )
        )


def _load(request: Request, load: Load, listen: Listen) -> LanguageModel:
    """Load the model and confirm the sites on it."""
    listen(StageStarted("loading the model"))
    lm = load(request.config)
    listen(StageStarted("confirming the sites"))
    confirm_loaded(lm, request.sites, request.parts)
    return compile_layers(lm, request.sites) if request.config.compile else lm


def _publish_plan(
    request: Request,
    lm: LanguageModel,
    contexts: ContextsSpec,
    layouts: RowLayouts,
    tokens: Tokens,
    out: Path,
    listen: Listen,
) -> Plan:
    """Publish the plan of a new store and return it; return another worker's plan if it was published first."""
    batch_size = request.config.batch_size
    if batch_size == "auto":
        listen(StageStarted("finding the batch size"))
        batch_size = choose_batch_size(lm, request.sites, tokens)
    plan = make_plan(request, model_source(lm), contexts, layouts.train.rows, layouts.heldout.rows, batch_size)
    try:
        write_plan(out, plan)
    except IncompatibleError:
        plan_of_another = read_plan(out)
        if plan_of_another is None:
            raise
        check_same_plan(plan_of_another, request, model_source(lm), out)
        write_plan(out, plan_of_another)
        return plan_of_another
    return plan


def _make_due_windows(
    plan: Plan,
    request: Request,
    layouts: RowLayouts,
    tokens: Tokens,
    lm: LanguageModel,
    out: Path,
    listen: Listen,
    worker: Worker,
) -> Made:
    """Make the windows of this worker that are missing."""
    listen(StageStarted("running the model"))
    due, totals = due_windows(plan, out, worker), WindowTotals(plan)
    if due:
        write_confirmed(out, passed_tests(plan.sites))
        first = all_windows(plan)[worker.rank : worker.rank + 1]
        nonfinite = NonfiniteRows(request.config.allow_nonfinite, tuple(first), lambda line: listen(Noted(line)))
        totals = make_windows(plan, due, layouts, tokens, lm, out, listen, nonfinite)
        if worker.world_size > 1 and nonfinite.total:  # the total of a whole store is noted when it is complete
            listen(Noted(nonfinite.total))
    return Made(len(due), totals)


def _already_complete(out: Path, listen: Listen) -> Store:
    store = open_store(out)
    if store.sealed:
        have, planned = len(store.manifest.windows), store.plan.windows + store.plan.heldout_windows
        raise IncompatibleError(
            f"{out} was sealed with {have} of its {planned} windows, and a sealed store takes no more rows. "
            "Harvest into another folder."
        )
    listen(Finished(0))
    _note_nonfinite(store, listen)
    return store


def _note_nonfinite(store: Store, listen: Listen) -> None:
    if note := nonfinite_note(store):
        listen(Noted(note))


def _check_empty(out: Path) -> None:
    """Raise IncompatibleError if `out` is a file, or a folder with anything but the start of a harvest in it."""
    if out.exists() and not out.is_dir():
        raise IncompatibleError(f"{out} is a file. Give a folder, which may be empty or not exist yet.")
    foreign = sorted({p.name for p in out.iterdir()} - BEFORE_THE_PLAN) if out.is_dir() else []
    if foreign and read_plan(out) is None:  # another worker may have published the plan in between
        raise IncompatibleError(f"{out} is not empty and is no store: it has {foreign[0]!r}. Give an empty folder.")


def _wait_for_others(out: Path, plan: Plan) -> tuple[str, ...]:
    """Wait up to PATIENCE_SECONDS for other workers; return the windows that have no record then."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (missing := unfinished(out, plan)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return tuple(f"{split}-{window:05d}" for split, window in missing)
