"""From settings to a plan: what is asked for, found out without weights, and compared with what was begun.

Names, widths, tokenizer and text are known in a second, so a wrong site or a changed setting is told before anything
is loaded or written; the plan is completed when the model is there. Which rows exist follows from the tokens alone.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gsae.errors import IncompatibleError, UsageError
from gsae.store import (
    DTYPE_BYTES,
    SCHEMA_VERSION,
    ContextsSpec,
    Layout,
    ModelSource,
    Plan,
    SiteSpec,
    Split,
    TokenizerSource,
    TokensPlan,
    changed_fields,
    chunk_rows,
    layout,
    row_mask,
)

from .config import HarvestConfig
from .model.capture import LanguageModel
from .model.loading import load_meta, load_tokenizer, tokenizer_sha256
from .model.model_files import find
from .model.sites import resolve
from .text.packing import SpecialIds, special_ids
from .text.sources import Text, documents

TEXT_LIBRARIES = ("gsae", "datasets", "tokenizers")
LIBRARIES = ("gsae", "torch", "transformers", "tokenizers", "numcodecs", "numpy")
HARDWARE = ("model.accelerator", "model.threads")
COUNTED_CONTEXTS = 4096


@dataclass(frozen=True)
class Request:
    """What a harvest is asked for: its settings and all that can be said without the model's weights."""

    config: HarvestConfig
    model_id: str
    model_revision: str | None
    model_bytes: int
    attn_implementation: str
    sites: tuple[SiteSpec, ...]
    tokenizer: Any
    special: SpecialIds
    text: Text


@dataclass(frozen=True)
class Rows:
    """Which rows the tokens give.

    train, heldout: the laid-out contexts of each split.
    """

    train: Layout
    heldout: Layout

    def of(self, split: Split) -> Layout:
        """Return the layout of a split."""
        return self.train if split == "train" else self.heldout


def make_request(config: HarvestConfig) -> Request:
    """Find model, sites, tokenizer and text; raises what each of them raises when it is not there."""
    text = documents(
        config.dataset,
        config.dataset_revision,
        config.split,
        config.token_field or config.text_field,
        tokenised=config.token_field is not None,
        shuffle_seed=config.shuffle_documents,
        skip=config.skip_documents,
        maximum=config.max_documents,
        repeat=config.repeat,
    )
    source = find(config.model, config.revision, weights=False)
    meta = load_meta(config.model, config.revision, config.attn_implementation)
    limit = getattr(meta.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.context_size > limit:
        raise UsageError(f"context_size {config.context_size} is more than the model's {limit} positions.")
    tokenizer = load_tokenizer(config.model, config.revision)
    return Request(
        config=config,
        model_id=source.id,
        model_revision=source.revision,
        model_bytes=sum(p.numel() for p in meta.parameters()) * DTYPE_BYTES[config.dtype],
        attn_implementation=meta.config._attn_implementation,
        sites=resolve(meta, config.sites),
        tokenizer=tokenizer,
        special=special_ids(tokenizer),
        text=text,
    )


def rows_of(asked: Request, tokens: NDArray[np.int32], split: NDArray[np.uint8]) -> Rows:
    """Lay out the rows of `tokens` (contexts, context_size) as the settings say."""
    config = asked.config
    counts = np.empty(len(tokens), np.int64)
    for at in range(0, len(tokens), COUNTED_CONTEXTS):
        mask = row_mask(tokens[at : at + COUNTED_CONTEXTS], asked.special.excluded_ids, config.dropped_positions)
        counts[at : at + COUNTED_CONTEXTS] = mask.sum(axis=1, dtype=np.int64)
    return Rows(
        layout(split, counts, "train", config.seed, config.window_rows, config.rows),
        layout(split, counts, "heldout", config.seed, config.window_rows, None),
    )


def model_source(lm: LanguageModel) -> ModelSource:
    """Return what the plan says of a loaded model; the thread count matters on a CPU only."""
    dtype: Any = lm.source.dtype
    return ModelSource(
        id=lm.source.id,
        revision=lm.source.revision,
        weights_sha256=lm.source.weights_sha256,
        dtype=dtype,
        attn_implementation=lm.source.attn_implementation,
        accelerator=lm.source.accelerator,
        threads=torch.get_num_threads() if lm.device.type == "cpu" else None,
        device_map=lm.source.device_map,
        compile=lm.source.compile,
    )


def make_plan(
    asked: Request, model: ModelSource, contexts: ContextsSpec, rows: tuple[int, int], batch_size: int
) -> Plan:
    """Return the plan; rows: train and held-out. batch_size: the one asked for, or found."""
    config = asked.config
    widest = max(site.d_in for site in asked.sites)
    return Plan(
        schema_version=SCHEMA_VERSION,
        model=model,
        tokenizer=_tokenizer_source(asked),
        dataset=asked.text.source,
        contexts=contexts,
        sites=asked.sites,
        requested_rows=config.rows,
        rows=rows[0],
        heldout_rows=rows[1],
        heldout=config.heldout_share,
        dropped_positions=config.dropped_positions,
        seed=config.seed,
        window_rows=config.window_rows,
        chunk_rows=chunk_rows(widest, config.dtype, config.window_rows),
        batch_size=batch_size,
        codec=config.codec,
        level=config.level,
        versions=_versions(LIBRARIES),
    )


def make_tokens_plan(asked: Request) -> TokensPlan:
    """Return what determines the tokens, which are written before there is a plan."""
    config = asked.config
    return TokensPlan(
        schema_version=SCHEMA_VERSION,
        tokenizer=_tokenizer_source(asked),
        dataset=asked.text.source,
        context_size=config.context_size,
        requested_rows=config.rows,
        heldout=config.heldout_share,
        dropped_positions=config.dropped_positions,
        seed=config.seed,
        versions=_versions(TEXT_LIBRARIES),
    )


def check_same(begun: Plan, asked: Request, model: ModelSource | None, out: Path) -> None:
    """Refuse to go on with a store that was begun with other settings, naming them (IncompatibleError).

    model: None while the weights are not loaded; what only they tell is then taken as it was begun.
    """
    config = asked.config
    unloaded = {
        "id": asked.model_id,
        "revision": asked.model_revision,
        "dtype": config.dtype,
        "attn_implementation": asked.attn_implementation,
        "device_map": config.device_map,
        "compile": config.compile,
    }
    source = model or begun.model.model_copy(update=unloaded)
    contexts = begun.contexts.model_copy(update={"context_size": config.context_size})
    size = begun.batch_size if config.batch_size == "auto" else config.batch_size
    plan = make_plan(asked, source, contexts, (begun.rows, begun.heldout_rows), size)
    changed = changed_fields(plan.model_dump(mode="json"), begun.model_dump(mode="json"))
    if config.any_hardware:
        changed = [change for change in changed if change[0] not in HARDWARE]
    hint = " Use --any-hardware to go on all the same." if {c[0] for c in changed} <= set(HARDWARE) else ""
    _refuse(changed, out, hint)


def check_same_tokens(begun: TokensPlan, asked: Request, out: Path, made: bool) -> None:
    """Refuse to go on with tokens that were begun with other settings, naming them (IncompatibleError).

    made: they are all there, so that it does not matter with which libraries.
    """
    plan = make_tokens_plan(asked)
    if made:
        plan = plan.model_copy(update={"versions": begun.versions})
    _refuse(changed_fields(plan.model_dump(mode="json"), begun.model_dump(mode="json")), out)


def _refuse(changed: list[tuple[str, Any, Any]], out: Path, hint: str = "") -> None:
    if changed:
        named = "; ".join(f"{field} was {was!r}, now {now!r}" for field, was, now in changed[:3])
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise IncompatibleError(
            f"{out} was begun with other settings: {named}{more}. Use those, or another folder.{hint}"
        )


def _tokenizer_source(asked: Request) -> TokenizerSource:
    return TokenizerSource(
        id=asked.model_id,
        sha256=tokenizer_sha256(asked.tokenizer),
        bos_id=asked.special.bos_id,
        eos_id=asked.special.eos_id,
        excluded_ids=asked.special.excluded_ids,
    )


def _versions(libraries: tuple[str, ...]) -> dict[str, str]:
    return {name: found for name in libraries if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
