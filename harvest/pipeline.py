"""The harvest: tokens, then the plan, then one window after the other (`windows.py`), then the manifest.

What is published stays, so a harvest may be killed anywhere and the same command goes on at the first window that has
no record. Several workers each make their share (`workers.py`).
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gsae.errors import IncompatibleError
from gsae.files import TMP, sweep
from gsae.store import (
    ContextsSpec,
    Plan,
    Store,
    is_complete,
    open_store,
    read_contexts,
    read_plan,
    unfinished,
    write_manifest,
    write_plan,
)

from .batch_size import choose_batch_size
from .config import HarvestConfig
from .estimate import check_room
from .events import Finished, Left, Listen, Stage
from .model.capture import LanguageModel
from .model.loading import cpu_threads, load_configured
from .model.torch_compile import compiled
from .request import Request, Rows, check_same, make_plan, make_request, model_source, rows_of
from .token_files import write_tokens
from .windows import due_windows, make_windows
from .workers import ALONE, Worker, device_of

# What a killed harvest may have left before it had a plan.
BEFORE_THE_PLAN = {"contexts", "documents", "tokens", TMP}
PATIENCE_SECONDS, POLL_SECONDS = 10.0, 0.25

Tokens = NDArray[np.int32]


Load = Callable[[HarvestConfig], LanguageModel]


def harvest(
    config: HarvestConfig,
    out: Path,
    listen: Listen = lambda event: None,
    load: Load = load_configured,
    own: Worker = ALONE,
) -> Store | None:
    """Make the store `out`, or go on with it, and return it; None when windows of other workers are missing.

    own: which of several workers this is. Each may be run again at any time, and any later run of any of them
    publishes the store when nothing is missing.

    Raises IncompatibleError when `out` holds something else or was begun with other settings, SpaceError when the
    disk is full, and what text, tokenizer, model and sites raise. What was published before an error stays, and the
    same call goes on from there.
    """
    config = config.model_copy(update={"device": device_of(config.device, own, torch.cuda.device_count())})
    with cpu_threads(config.threads):
        return _harvest(config, out, listen, load, own)


def harvest_tokens(config: HarvestConfig, out: Path, listen: Listen = lambda event: None) -> None:
    """Write the tokens of the store `out` and stop there: `harvest` goes on with them, on this machine or another.

    Needs the model's config and tokenizer, not its weights. Raises as `harvest` does.
    """
    begun, asked = _begin(config, out)
    if begun is None:
        sweep(out)
        _tokens(asked, out, listen)
        sweep(out)


def _harvest(config: HarvestConfig, out: Path, listen: Listen, load: Load, own: Worker) -> Store | None:
    begun, asked = _begin(config, out)
    if is_complete(out):
        return _already_complete(out, listen)
    sweep(out)
    if begun is None and config.rows is not None:
        check_room(asked, config.rows, out)
    spec = begun.contexts if begun is not None else _tokens(asked, out, listen)
    plan, made = begun, 0
    if plan is None or due_windows(plan, out, own):
        tokens, split = read_contexts(out, spec)
        rows = rows_of(asked, tokens, split)
        check_room(asked, _rows_left(begun, rows, out), out)
        listen(Stage("loading the model"))
        lm = load(config)
        if config.compile:
            lm = compiled(lm, asked.sites)
        if begun is not None:
            check_same(begun, asked, model_source(lm), out)
        plan = begun or _settled(asked, lm, spec, rows, tokens, out, listen)
        write_plan(out, plan)
        listen(Stage("running the model"))
        if due := due_windows(plan, out, own):
            make_windows(plan, due, rows, tokens, lm, out, listen)
        made = len(due)
    if own.world_size > 1 and (missing := _missing(out, plan)):
        listen(Left(made, missing))
        return None
    listen(Stage("writing the manifest"))
    write_manifest(out, plan)
    sweep(out)
    listen(Finished(made))
    return open_store(out)


def _begin(config: HarvestConfig, out: Path) -> tuple[Plan | None, Request]:
    """Return the plan that `out` was begun with, if any, and what is asked for, which is the same."""
    begun = read_plan(out)
    if begun is None:
        _check_fresh(out)
    asked = make_request(config)
    if begun is not None:
        check_same(begun, asked, None, out)
    return begun, asked


def _tokens(asked: Request, out: Path, listen: Listen) -> ContextsSpec:
    listen(Stage("reading the text"))
    return write_tokens(asked, out, listen, lambda: listen(Stage("waiting for another worker's tokens")))


def _rows_left(begun: Plan | None, rows: Rows, out: Path) -> int:
    """Return the rows of all windows, also of other workers, that have no record."""
    if begun is None:
        return rows.train.rows + rows.heldout.rows
    return sum(rows.of(split).window(number).rows for split, number in unfinished(out, begun))


def _settled(
    asked: Request, lm: LanguageModel, spec: ContextsSpec, rows: Rows, tokens: Tokens, out: Path, listen: Listen
) -> Plan:
    """Return the plan of a new store, with a batch size that fits; another worker may have settled it meanwhile."""
    size = asked.config.batch_size
    if size == "auto":
        listen(Stage("finding the batch size"))
        size = choose_batch_size(lm, asked.sites, tokens)
    plan = make_plan(asked, model_source(lm), spec, (rows.train.rows, rows.heldout.rows), size)
    try:
        write_plan(out, plan)
    except IncompatibleError:
        first = read_plan(out)
        if first is None:
            raise
        check_same(first, asked, model_source(lm), out)
        return first
    return plan


def _already_complete(out: Path, listen: Listen) -> Store:
    store = open_store(out)
    if store.sealed:
        have, due = len(store.manifest.windows), store.plan.windows + store.plan.heldout_windows
        raise IncompatibleError(
            f"{out} was sealed with {have} of its {due} windows and never changes again. "
            "Harvest into another folder for more rows."
        )
    listen(Finished(0))
    return store


def _check_fresh(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise IncompatibleError(f"{out} is a file. A store needs a folder of its own.")
    foreign = sorted({p.name for p in out.iterdir()} - BEFORE_THE_PLAN) if out.is_dir() else []
    if foreign and read_plan(out) is None:  # another worker may just have begun
        raise IncompatibleError(f"{out} is not empty and no store: it has {foreign[0]!r}. Give an empty folder.")


def _missing(out: Path, plan: Plan) -> tuple[str, ...]:
    """Wait a little for other workers, and return the windows that still have no record."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (missing := unfinished(out, plan)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return tuple(f"{split}-{window:05d}" for split, window in missing)
