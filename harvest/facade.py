"""What `gsae.harvest` exports: one list for its users and for the type checkers.

`__init__` imports this file when a name is first used, because it imports torch. To export a name, add it here.
A name must not equal that of a file of the room: Python would then give the module.
"""

from .config import HarvestConfig
from .cost_estimate import estimate_harvest
from .events import BatchDone, Event, Finished, Noted, StageStarted, WorkerDone
from .model.capture import LanguageModel, Provenance, capture
from .model.edit_effects import effects
from .model.loading import load_lm, load_meta, load_planned, load_tokenizer, tokenizer_sha256
from .model.logit_effects import logit_effects, token_texts
from .model.model_files import weights_are_local
from .model.sites import Survey, offered, resolve, split_names, survey
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
    "Event",
    "Finished",
    "HarvestConfig",
    "LanguageModel",
    "Noted",
    "Provenance",
    "Request",
    "StageStarted",
    "Survey",
    "Text",
    "TextRequest",
    "Worker",
    "WorkerDone",
    "capture",
    "compile_layers",
    "documents",
    "effects",
    "estimate_harvest",
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
    "survey",
    "token_texts",
    "tokenise",
    "tokenizer_sha256",
    "weights_are_local",
    "worker",
    "write_tokens",
]
