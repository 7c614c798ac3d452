"""What `gsae.harvest` exports: one list for its users and for the type checkers.

`__init__` imports this file when a name is first used, because it imports torch. To export a name, add it here.
A name must not equal that of a file of the room: Python would then give the module.
"""

from .config import HarvestConfig
from .estimate import estimate_harvest, probe
from .events import Event, Finished, Left, Running, Stage
from .model.capture import LanguageModel, Provenance, capture
from .model.loading import load_lm, load_meta, load_planned, load_tokenizer, tokenizer_sha256
from .model.logits import logit_effects, token_texts
from .model.model_files import is_at_hand
from .model.predictions import Edit, effects
from .model.sites import offered, resolve, split_names
from .model.torch_compile import compiled
from .pipeline import harvest, harvest_tokens
from .request import make_request
from .text.packing import Block, BlockTokenised, SpecialIds, special_ids, tokenise
from .text.sources import Document, Text, documents
from .token_files import write_tokens
from .workers import Worker, worker

__all__ = [
    "Block",
    "BlockTokenised",
    "Document",
    "Edit",
    "Event",
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
    "estimate_harvest",
    "harvest",
    "harvest_tokens",
    "is_at_hand",
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
    "worker",
    "write_tokens",
]
