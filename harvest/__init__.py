"""Text to contexts to activations: everything that needs the language model or the text.

`documents` reads a text, `tokenise` packs it into contexts, `load_lm` finds and loads a model, `resolve`
turns site names into places in it, `capture` runs it as far as the sites need, `effects` says what edits
there cost and `logit_effects` what a direction there says. Imports nothing but `gsae.store`; transformers and datasets
are imported when first needed.
"""

from .config import HarvestConfig
from .estimate import estimate, probe
from .events import Finished, Left, Running, Stage
from .model.capture import LanguageModel, Provenance, capture
from .model.loading import load_lm, load_meta, load_planned, load_tokenizer, tokenizer_sha256
from .model.logits import logit_effects, token_texts
from .model.model_files import is_at_hand
from .model.predictions import Edit, effects
from .model.sites import offered, resolve, split_names
from .model.torch_compile import compiled
from .pipeline import harvest, harvest_tokens
from .request import request
from .text.packing import Block, BlockTokenised, SpecialIds, special_ids, tokenise
from .text.sources import Document, Text, documents
from .token_files import write_tokens
from .workers import Worker, worker

__all__ = [
    "Block",
    "BlockTokenised",
    "Document",
    "Edit",
    "Finished",
    "HarvestConfig",
    "LanguageModel",
    "Left",
    "Provenance",
    "Running",
    "SpecialIds",
    "Stage",
    "Text",
    "Worker",
    "capture",
    "compiled",
    "documents",
    "effects",
    "estimate",
    "harvest",
    "harvest_tokens",
    "is_at_hand",
    "load_lm",
    "load_meta",
    "load_planned",
    "load_tokenizer",
    "logit_effects",
    "offered",
    "probe",
    "request",
    "resolve",
    "special_ids",
    "split_names",
    "token_texts",
    "tokenise",
    "tokenizer_sha256",
    "worker",
    "write_tokens",
]
