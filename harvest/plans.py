"""The plans of a store, made from a request: plan.json, and before it the plan of the tokens alone.

The plan of the tokens holds the settings that determine them. The full plan also needs the finished tokens and the
loaded model, because it records their counts, the hash of the weights and the hardware.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gsae.store import (
    ContextsSpec,
    ModelSource,
    Plan,
    TokenizerSource,
    TokensPlan,
    chunk_rows,
)

from .model.capture import LanguageModel
from .model.loading import tokenizer_sha256
from .model.quantisation import PACKAGES
from .request import Request

TEXT_LIBRARIES = ("gsae", "datasets", "tokenizers")
LIBRARIES = ("gsae", "torch", "transformers", "tokenizers", "numcodecs", "numpy")


def make_tokens_plan(request: Request) -> TokensPlan:
    """Return the settings that determine the tokens, which are published before the first token is written."""
    config = request.config
    return TokensPlan(
        schema_version=request.text.source.schema_version,
        tokenizer=_tokenizer_source(request),
        dataset=request.text.source,
        context_size=config.context_size,
        requested_rows=config.rows,
        heldout=config.heldout_share,
        dropped_positions=config.dropped_positions,
        seed=config.seed,
        versions=_versions(TEXT_LIBRARIES),
    )


def make_plan(
    request: Request, model: ModelSource, contexts: ContextsSpec, rows: int, heldout_rows: int, batch_size: int
) -> Plan:
    """Return the plan of a store with finished tokens.

    rows, heldout_rows: rows of each split. batch_size: contexts in a forward pass; the request may only say "auto".
    """
    config = request.config
    widest = max(site.d_in for site in request.sites)
    return Plan(
        schema_version=max(each.schema_version for each in (model, request.text.source, contexts)),
        model=model,
        tokenizer=_tokenizer_source(request),
        dataset=request.text.source,
        contexts=contexts,
        sites=request.sites,
        requested_rows=config.rows,
        rows=rows,
        heldout_rows=heldout_rows,
        heldout=config.heldout_share,
        dropped_positions=config.dropped_positions,
        seed=config.seed,
        window_rows=config.window_rows,
        chunk_rows=chunk_rows(widest, config.dtype, config.window_rows),
        batch_size=batch_size,
        codec=config.codec,
        level=config.level,
        versions=_versions((*LIBRARIES, *_packages(model))),
    )


def model_source(lm: LanguageModel) -> ModelSource:
    """Return what the plan records about a loaded model. The thread count is recorded on a CPU only."""
    dtype: Any = lm.provenance.dtype
    return ModelSource(
        id=lm.provenance.id,
        revision=lm.provenance.revision,
        weights_sha256=lm.provenance.weights_sha256,
        dtype=dtype,
        attn_implementation=lm.provenance.attn_implementation,
        accelerator=lm.provenance.accelerator,
        threads=torch.get_num_threads() if lm.device.type == "cpu" else None,
        device_map=lm.provenance.device_map,
        compile=lm.provenance.compile,
        base=lm.provenance.base,
        adapter_sha256=lm.provenance.adapter_sha256,
        code=lm.provenance.code,
        quantization=lm.provenance.quantization,
    )


def _tokenizer_source(request: Request) -> TokenizerSource:
    return TokenizerSource(
        id=request.tokenizer_id,
        sha256=tokenizer_sha256(request.tokenizer),
        bos_id=request.special.bos_id,
        eos_id=request.special.eos_id,
        excluded_ids=request.special.excluded_ids,
    )


def _packages(model: ModelSource) -> tuple[str, ...]:
    """Return the packages, besides those of every harvest, that decide the weights of a model."""
    quantisers = PACKAGES.get(model.quantization.method, ()) if model.quantization else ()
    return (*(("peft",) if model.base else ()), *quantisers)


def _versions(libraries: tuple[str, ...]) -> dict[str, str]:
    return {name: found for name in libraries if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
