"""The harvest: tokens, then the plan, then one window after the other, then the manifest.

A window is made alone: its contexts are run in the batches that `gsae.store.order` dictates, each row goes straight
to its place in the window's buffer, and a background thread encodes and publishes one window while the model runs
the next. So a harvest may be killed anywhere and the same command goes on at the first window that has no record.
Memory: the model, the tokens and two windows a site. Several workers each make their share (`workers.py`).
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gsae.store import (
    ContextsSpec,
    IncompatibleError,
    Plan,
    Split,
    Store,
    all_windows,
    contexts,
    empty_rows,
    is_complete,
    open_store,
    order,
    publish,
    scatter,
    unsigned,
    writer,
)

from .config import HarvestConfig
from .lm import LanguageModel, capture, load_lm
from .planning import Request, Rows, check_same, make_plan, model_source, request, rows_of
from .tokens import BlockTokenised, tokenise
from .workers import ALONE, Worker, device_of

# What a killed harvest may have left before it had a plan.
BEFORE_THE_PLAN = {"contexts", "documents", publish.TMP}
PATIENCE_SECONDS, POLL_SECONDS = 10.0, 0.25

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Stage:
    """The harvest begins something that takes a while."""

    name: Literal["reading the text", "loading the model", "running the model", "writing the manifest"]


@dataclass(frozen=True)
class Running:
    """The model has run a batch; of the `total` rows that were due when this call began, `rows` are made."""

    rows: int
    total: int


@dataclass(frozen=True)
class Finished:
    """The store is complete; this call made `windows` of its windows: 0 when it was complete before."""

    windows: int


@dataclass(frozen=True)
class Left:
    """This worker is done, having made `windows` windows; those `missing`, as `train-00003`, are other workers'."""

    windows: int
    missing: tuple[str, ...]


Event = Stage | BlockTokenised | Running | Finished | Left
Listen = Callable[[Event], None]
Load = Callable[[HarvestConfig], LanguageModel]


def load_configured(config: HarvestConfig) -> LanguageModel:
    """Load the language model that the settings name."""
    return load_lm(config.model, config.revision, config.dtype, config.device, config.attn_implementation)


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
    with _cpu_threads(config.threads):
        return _harvest(config, out, listen, load, own)


def _harvest(config: HarvestConfig, out: Path, listen: Listen, load: Load, own: Worker) -> Store | None:
    begun = writer.read_plan(out)
    if begun is None:
        _check_fresh(out)
    asked = request(config)
    if begun is not None:
        check_same(begun, asked, None, out)
        if is_complete(out):
            return _already_complete(out, listen)
    publish.sweep(out)
    listen(Stage("reading the text"))
    spec = begun.contexts if begun is not None else _write_contexts(asked, out, listen)
    plan, made = begun, 0
    if plan is None or _due(plan, out, own):
        tokens, split = contexts.read_contexts(out, spec)
        rows = rows_of(asked, tokens, split)
        listen(Stage("loading the model"))
        lm = load(config)
        if begun is not None:
            check_same(begun, asked, model_source(lm), out)
        plan = begun or make_plan(asked, model_source(lm), spec, (rows.train.rows, rows.heldout.rows))
        writer.write_plan(out, plan)
        listen(Stage("running the model"))
        made = _run(plan, tokens, rows, lm, out, own, listen)
    if own.world_size > 1 and (missing := _missing(out, plan)):
        listen(Left(made, missing))
        return None
    listen(Stage("writing the manifest"))
    writer.write_manifest(out, plan)
    publish.sweep(out)
    listen(Finished(made))
    return open_store(out)


@contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    if foreign and writer.read_plan(out) is None:  # another worker may just have begun
        raise IncompatibleError(f"{out} is not empty and no store: it has {foreign[0]!r}. Give an empty folder.")


def _write_contexts(asked: Request, out: Path, listen: Listen) -> ContextsSpec:
    config = asked.config
    made = tokenise(
        asked.texts,
        asked.tokenizer,
        context_size=config.context_size,
        rows=config.rows,
        heldout=config.heldout_share,
        seed=config.seed,
        dropped_positions=config.dropped_positions,
        first=config.skip_documents,
        listen=listen,
    )
    values: dict[str, NDArray[Any]] = {
        "contexts/tokens": made.tokens,
        "contexts/split": made.split,
        "documents/start": made.document_start,
        "documents/id": made.document_id,
        "documents/split": made.document_split,
    }
    return contexts.write_contexts(out, values, made.ended_early)


def _due(plan: Plan, out: Path, own: Worker) -> list[tuple[Split, int]]:
    """Return the windows of a worker that have no record, in the order of work."""
    numbers = {window: number for number, window in enumerate(all_windows(plan))}
    return [window for window in writer.unfinished(out, plan) if own.takes(numbers[window])]


def _missing(out: Path, plan: Plan) -> tuple[str, ...]:
    """Wait a little for other workers, and return the windows that still have no record."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (missing := writer.unfinished(out, plan)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return tuple(f"{split}-{window:05d}" for split, window in missing)


def _run(plan: Plan, tokens: Tokens, rows: Rows, lm: LanguageModel, out: Path, own: Worker, listen: Listen) -> int:
    """Make every window of this worker that has no record, and return how many that were."""
    due = _due(plan, out, own)
    layouts = {"train": rows.train, "heldout": rows.heldout}
    total = sum(layouts[split].window(w).rows for split, w in due)
    made = 0

    def heard(count: int) -> None:
        nonlocal made
        made += count
        listen(Running(made, total))

    with ThreadPoolExecutor(1, thread_name_prefix="gsae-write") as background:
        writing: Future[None] | None = None
        for split, w in due:
            window = layouts[split].window(w)
            values, source = _activations(plan, split, window, tokens, rows.mask, lm, heard)
            if writing is not None:
                writing.result()
            writing = background.submit(writer.write_window, out, plan, split, w, values, source)
        if writing is not None:
            writing.result()
    return len(due)


def _activations(
    plan: Plan,
    split: Split,
    window: order.Window,
    tokens: Tokens,
    mask: order.Mask,
    lm: LanguageModel,
    heard: Callable[[int], None],
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Run the contexts of a window; return each site's rows (rows, d_in) as bit patterns, and their sources."""
    stored = order.stored_order(window, split, plan.seed)
    places = order.inverse(stored)
    kind = unsigned(plan.model.dtype)
    buffers = {site.name: empty_rows(window.rows, site.d_in, kind) for site in plan.sites}
    before = -window.skip  # laid rows of the window before this batch; the first context may have begun in another
    for batch in order.batches(len(window.contexts), plan.batch_size):
        own = window.contexts[batch]
        found = capture(lm, plan.sites, torch.from_numpy(tokens[own]))
        rows = torch.from_numpy(mask[own])
        count = int(mask[own].sum())
        first, last = max(-before, 0), min(count, window.rows - before)
        for name, activations in found.items():
            values = activations[rows.to(activations.device)][first:last]
            bits = values.to("cpu").contiguous().view(getattr(torch, kind.__name__)).numpy()
            scatter(bits, buffers[name], places[before + first : before + last])
        before += count
        heard(last - first)
    return buffers, window.sources(mask[window.contexts])[stored]
