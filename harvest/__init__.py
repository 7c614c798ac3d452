"""Text to contexts to activations: everything that needs the language model or the text.

`documents` opens a text, `tokenise` packs it into contexts, `load_lm` loads a model, `resolve` turns site names into
modules of it, and `capture` runs it up to these sites. `harvest` does all of it and writes a store. `effects` measures
edits of a site, `logit_effects` the direct effect of a direction. Imports only the rooms below it (`gsae.store`);
transformers and datasets are imported when they are first used.
"""

from .config import HarvestConfig
from .cost_estimate import estimate
from .events import BatchDone, Finished, StageStarted, WorkerDone
from .model.capture import LanguageModel, Provenance, capture
from .model.edit_effects import effects
from .model.loading import load_lm, load_meta, load_planned, load_tokenizer, tokenizer_sha256
from .model.logit_effects import logit_effects, token_texts
from .model.model_files import weights_are_local
from .model.sites import offered, resolve, split_names
from .model.torch_compile import compile_layers
from .pipeline import harvest, harvest_tokens
from .probe_run import probe
from .request import Request, make_request
from .text.document import Document, Text, TextRequest
from .text.encoding import special_ids
from .text.packing import Block, BlockTokenised, tokenise
from .text.sources import documents
from .token_files import write_tokens
from .workers import Worker, worker

__all__ = [
    "BatchDone",
    "Block",
    "BlockTokenised",
    "Document",
    "Finished",
    "HarvestConfig",
    "LanguageModel",
    "Provenance",
    "Request",
    "StageStarted",
    "Text",
    "TextRequest",
    "Worker",
    "WorkerDone",
    "capture",
    "compile_layers",
    "documents",
    "effects",
    "estimate",
    "harvest",
    "harvest_tokens",
    "load_lm",
    "load_meta",
    "load_planned",
    "load_tokenizer",
    "logit_effects",
    "make_request",
    "offered",
    "probe",
    "resolve",
    "special_ids",
    "split_names",
    "token_texts",
    "tokenise",
    "tokenizer_sha256",
    "weights_are_local",
    "worker",
    "write_tokens",
]
