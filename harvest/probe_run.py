"""The short run of a model that measures a harvest: rows for each token, compression ratios and speed on this machine.

It takes the first documents of the text, two passes of one batch, and one chunk for each site. It costs about as much
time as loading the model.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsae.errors import UsageError
from gsae.store import Stream, chunk_rows, encoded_bytes, permutation, row_mask

from .batch_size import choose_batch_size
from .config import HarvestConfig
from .model.capture import LanguageModel, capture
from .model.loading import cpu_threads, load_configured
from .model.overflow import confirm_loaded
from .model.torch_compile import compile_layers
from .nonfinite import refusal
from .request import Request
from .row_mover import BITS
from .text.packing import tokenise

PROBE_DOCUMENTS, PROBE_CHARACTERS = 64, 1 << 20


@dataclass(frozen=True)
class Probe:
    """What a short run measured on `rows` rows.

    ratios: encoded size over raw size by site. nonfinite: the number of rows with a NaN or an infinity by site.
    """

    batch_size: int
    contexts_per_row: float
    tokens_per_second: float
    ratios: dict[str, float]
    rows: int
    nonfinite: dict[str, int]


def probe(request: Request, load: Callable[[HarvestConfig], LanguageModel] = load_configured) -> Probe:
    """Run the model over the first documents of the text; raises the errors of loading and running it.

    Raises UsageError if a row has a NaN or an infinity, unless the settings allow such rows.
    """
    with cpu_threads(request.config.threads):
        return _probe(request, load)


def _probe(request: Request, load: Callable[[HarvestConfig], LanguageModel]) -> Probe:
    config = request.config
    tokens = _first_contexts(request)
    lm = load(config)
    confirm_loaded(lm, request.sites, request.parts)
    if config.compile:
        lm = compile_layers(lm, request.sites)
    size = choose_batch_size(lm, request.sites, tokens) if config.batch_size == "auto" else config.batch_size
    mask = row_mask(tokens, request.special.excluded_ids, config.dropped_positions)
    rows = chunk_rows(max(site.d_in for site in request.sites), config.dtype, config.window_rows)
    picks = torch.from_numpy(np.flatnonzero(mask[:size])[:rows])
    batch = torch.from_numpy(np.resize(tokens, (size, config.context_size)))

    def pick(value: Tensor) -> Tensor:
        return value.flatten(0, 1)[picks.to(value.device)].cpu()

    found = capture(lm, request.sites, batch, pick)  # the first pass warms up
    began = time.perf_counter()
    capture(lm, request.sites, batch, pick)
    tokens_per_second = batch.numel() / (time.perf_counter() - began)
    ratios = {name: _ratio(config, value) for name, value in found.items()}
    nonfinite = {name: int((~value.isfinite().all(1)).sum()) for name, value in found.items()}
    if any(nonfinite.values()) and not config.allow_nonfinite:
        raise UsageError(refusal("A short run over the text", nonfinite, len(picks)))
    return Probe(size, len(tokens) / int(mask.sum()), tokens_per_second, ratios, len(picks), nonfinite)


def _first_contexts(request: Request) -> NDArray[np.int32]:
    """Return the contexts (contexts, context_size) of the first documents, of which long ones are cut."""
    documents = islice(request.text.read(), PROBE_DOCUMENTS)
    size = request.config.context_size
    blocks = list(
        tokenise(
            [document._replace(content=document.content[:PROBE_CHARACTERS]) for document in documents],
            request.tokenizer,
            context_size=size,
            rows=None,
            heldout=0.0,
            seed=request.config.seed,
            dropped_positions=request.config.dropped_positions,
        )
    )
    for block in blocks:
        request.known_tokens.check(block)
    return np.concatenate([np.empty((0, size), np.int32), *(block.tokens for block in blocks)])


def _ratio(config: HarvestConfig, rows: Tensor) -> float:
    """Return encoded size over raw size of rows (rows, d_in) as one chunk in shuffled order."""
    bits = rows.view(BITS[rows.itemsize]).numpy()
    mixed = bits[permutation(len(bits), 0, Stream.TRAIN_ROWS)]
    return encoded_bytes(mixed, config.dtype, config.codec, config.level) / bits.nbytes
