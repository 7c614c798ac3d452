"""The harvest: tokens, then the plan, then one window after the other, then the manifest.

A window is made alone: its contexts are run in the batches that `gsae.store.order` dictates, each row goes straight
to its place in the window's buffer, and a background thread encodes and publishes one window while the model runs
the next. So a harvest may be killed anywhere and the same command goes on at the first window that has no record.
Memory: the model, the tokens and two windows a site.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gsae.store import (
    DTYPE_BYTES,
    ContextsSpec,
    IncompatibleError,
    Plan,
    Split,
    Store,
    contexts,
    empty_rows,
    is_complete,
    open_store,
    order,
    publish,
    scatter,
    writer,
)

from .config import HarvestConfig
from .lm import LanguageModel, capture, load_lm
from .planning import Request, Rows, check_same, make_plan, model_source, request, rows_of
from .tokens import BlockTokenised, tokenise

# What a killed harvest may have left before it had a plan.
BEFORE_THE_PLAN = {"contexts", "documents", publish.TMP}
UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}

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


Event = Stage | BlockTokenised | Running | Finished
Listen = Callable[[Event], None]
Load = Callable[[HarvestConfig], LanguageModel]


def load_configured(config: HarvestConfig) -> LanguageModel:
    """Load the language model that the settings name."""
    return load_lm(config.model, config.revision, config.dtype, config.device, config.attn_implementation)


def harvest(
    config: HarvestConfig, out: Path, listen: Listen = lambda event: None, load: Load = load_configured
) -> Store:
    """Make the store `out`, or go on with it, and return it.

    Raises IncompatibleError when `out` holds something else or was begun with other settings, SpaceError when the
    disk is full, and what text, tokenizer, model and sites raise. What was published before an error stays, and the
    same call goes on from there.
    """
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
    tokens, split = contexts.read_contexts(out, spec)
    rows = rows_of(asked, tokens, split)
    listen(Stage("loading the model"))
    lm = load(config)
    if begun is not None:
        check_same(begun, asked, model_source(lm), out)
    plan = begun or make_plan(asked, model_source(lm), spec, (rows.train.rows, rows.heldout.rows))
    writer.write_plan(out, plan)
    listen(Stage("running the model"))
    made = _run(plan, tokens, rows, lm, out, listen)
    listen(Stage("writing the manifest"))
    writer.write_manifest(out, plan)
    publish.sweep(out)
    listen(Finished(made))
    return open_store(out)


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
    if foreign:
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


def _run(plan: Plan, tokens: Tokens, rows: Rows, lm: LanguageModel, out: Path, listen: Listen) -> int:
    """Make every window that has no record, and return how many that were."""
    due = writer.unfinished(out, plan)
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
    kind = UNSIGNED[DTYPE_BYTES[plan.model.dtype]]
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
