"""What a harvest would take, from its settings and, where the model is at hand, from a short run of it.

The run takes the first documents of the text, two passes and one chunk a site: so ratio and rate are measured, on this
machine, in about the time that the model takes to load. Without it bytes are told from what the codec is known for. A
harvest that the disk has no room for is refused before it begins.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsae.errors import SpaceError
from gsae.store import DTYPE_BYTES, Stream, chunk_rows, encoded_bytes, permutation, row_mask

from .batch_size import choose_batch_size
from .config import HarvestConfig
from .model.capture import LanguageModel, capture
from .model.loading import cpu_threads, load_configured
from .model.torch_compile import compiled
from .request import Request
from .row_mover import BITS
from .text.packing import tokenise

# What the codecs take of raw rows, where nothing was measured.
TYPICAL = {"planes 0": 0.755, "planes 1": 0.68, "zstd": 0.79, "none": 1.0}
# Sources and tokens, before compression.
BYTES_BESIDE_A_ROW = 12
PROBE_DOCUMENTS, PROBE_CHARACTERS = 64, 1 << 20
# Python, the libraries, batches on their way, a chunk a thread: bench/harvest.py --part memory.
BESIDE_BYTES = 1 << 30


@dataclass(frozen=True)
class Probe:
    """What a short run showed. ratios: by site, of raw rows; rows: that they come from."""

    batch_size: int
    contexts_per_row: float
    tokens_per_second: float
    ratios: dict[str, float]
    rows: int


def probe(asked: Request, load: Callable[[HarvestConfig], LanguageModel] = load_configured) -> Probe:
    """Run the model over the beginning of the text; raises what loading and running raise."""
    with cpu_threads(asked.config.threads):
        return _probe(asked, load)


def _probe(asked: Request, load: Callable[[HarvestConfig], LanguageModel]) -> Probe:
    config = asked.config
    tokens = _some_contexts(asked)
    lm = load(config)
    if config.compile:
        lm = compiled(lm, asked.sites)
    size = choose_batch_size(lm, asked.sites, tokens) if config.batch_size == "auto" else config.batch_size
    mask = row_mask(tokens, asked.special.excluded_ids, config.dropped_positions)
    rows = chunk_rows(max(site.d_in for site in asked.sites), config.dtype, config.window_rows)
    picks = torch.from_numpy(np.flatnonzero(mask[:size])[:rows])
    batch = torch.from_numpy(np.resize(tokens, (size, config.context_size)))

    def pick(value: Tensor) -> Tensor:
        return value.flatten(0, 1)[picks.to(value.device)].cpu()

    found = capture(lm, asked.sites, batch, pick)
    began = time.perf_counter()
    capture(lm, asked.sites, batch, pick)
    rate = batch.numel() / (time.perf_counter() - began)
    ratios = {name: _ratio(config, value) for name, value in found.items()}
    return Probe(size, len(tokens) / int(mask.sum()), rate, ratios, len(picks))


def _some_contexts(asked: Request) -> NDArray[np.int32]:
    """Return the contexts (contexts, context_size) of the first documents."""
    documents = islice(asked.text.read(), PROBE_DOCUMENTS)
    size = asked.config.context_size
    blocks = tokenise(
        [each._replace(content=each.content[:PROBE_CHARACTERS]) for each in documents],
        asked.tokenizer,
        context_size=size,
        rows=None,
        heldout=0.0,
        seed=asked.config.seed,
        dropped_positions=asked.config.dropped_positions,
    )
    return np.concatenate([np.empty((0, size), np.int32), *(block.tokens for block in blocks)])


def _ratio(config: HarvestConfig, rows: Tensor) -> float:
    """Return what the codec makes of rows (rows, d_in), as one chunk in mixed order, of their raw size."""
    bits = rows.view(BITS[rows.itemsize]).numpy()
    mixed = bits[permutation(len(bits), 0, Stream.TRAIN_ROWS)]
    return encoded_bytes(mixed, config.dtype, config.codec, config.level) / bits.nbytes


def estimate_harvest(asked: Request, out: Path, found: Probe | None = None) -> dict[str, Any]:
    """Return what a harvest would take, for `--dry-run`: figures that follow from the rows are None when all are asked.

    found: what a short run showed; without it there is no time, and bytes are the codec's typical ones. Memory is for
    one worker, the model's weights included.
    """
    config, rows = asked.config, asked.config.rows
    heldout = None if rows is None else int(rows * config.heldout_share / (1 - config.heldout_share))
    every = None if rows is None or heldout is None else rows + heldout
    row_bytes = sum(site.d_in for site in asked.sites) * DTYPE_BYTES[config.dtype]
    window = config.window_rows if every is None else min(config.window_rows, every)
    contexts_per_row = found.contexts_per_row if found else 1 / (config.context_size - 1)
    contexts = None if every is None else int(every * contexts_per_row) + 1
    windows = None if rows is None or heldout is None else sum(-(-n // config.window_rows) for n in (rows, heldout))
    seconds = None if found is None or contexts is None else contexts * config.context_size / found.tokens_per_second
    return {
        "model": asked.model_id,
        "dataset": asked.text.source.id,
        "sites": {site.name: {"d_in": site.d_in, "module": site.module} for site in asked.sites},
        "context_size": config.context_size,
        "batch_size": found.batch_size if found else config.batch_size,
        "rows": rows,
        "heldout_rows": heldout,
        "contexts": contexts,
        "windows": windows,
        "raw_bytes": None if every is None else every * row_bytes,
        "ratio": found.ratios if found else typical_ratio(config),
        "ratio_is": f"measured on {found.rows} rows" if found else f"typical of {config.codec} {config.level}",
        "disk_bytes": None if every is None else _disk_bytes(asked, every, found),
        "free_bytes": free_bytes(out),
        "model_bytes": asked.model_bytes,
        "window_memory_bytes": 2 * window * row_bytes,
        "memory_bytes": asked.model_bytes + 2 * window * row_bytes + BESIDE_BYTES,
        "tokens_per_second": found.tokens_per_second if found else None,
        "seconds": seconds,
    }


def _disk_bytes(asked: Request, rows: int, found: Probe | None) -> int:
    config = asked.config
    ratios = found.ratios if found else {site.name: typical_ratio(config) for site in asked.sites}
    row = sum(site.d_in * DTYPE_BYTES[config.dtype] * ratios[site.name] for site in asked.sites)
    return int(rows * (row + BYTES_BESIDE_A_ROW))


def typical_ratio(config: HarvestConfig) -> float:
    """Return what the codec usually takes of raw rows."""
    return TYPICAL[f"planes {config.level}" if config.codec == "planes" else config.codec]


def check_room(asked: Request, rows: int, out: Path) -> None:
    """Raise SpaceError where the disk of `out` has no room for `rows` rows more, unless the settings say `force`."""
    needed, free = _disk_bytes(asked, rows, None), free_bytes(out)
    if needed > free and not asked.config.force:
        raise SpaceError(
            f"{out} needs about {needed / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free there. "
            "Free some, harvest fewer rows, or begin all the same with --force."
        )


def free_bytes(out: Path) -> int:
    """Return the free bytes of the disk that `out` is on, or will be on."""
    there = out.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
