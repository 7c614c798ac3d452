"""What a harvest is asked for: the settings, with the model, sites, tokenizer and text that they name.

Everything here is found without the model's weights, so that a wrong name is refused before anything is loaded or
written. It costs about a second, plus the download of the model's config and tokenizer when they are not cached.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gsae.store import DTYPE_BYTES, DatasetSource, QuantizationSource, SiteSpec

from .config import HarvestConfig
from .model.checkpoint_dtype import checkpoint_dtype
from .model.layer_parts import Parts
from .model.loading import check_files, declared_quantisation, load_meta, load_tokenizer
from .model.model_files import find_model
from .model.positions import positions_of
from .model.quantisation import recorded
from .model.remote_code import trusted_code
from .model.sites import resolve_with_parts
from .text.document import Text
from .text.encoding import SpecialIds, special_ids
from .text.known_tokens import KnownTokens
from .text.sources import documents


@dataclass(frozen=True)
class Request:
    """The settings of a harvest, and what can be known about it without the model's weights.

    base: id and revision of the model that an adapter is merged into. code: the sha256 of each file of the model's own
    code. model_bytes: size of the weights in the dtype of the settings. sites: in the order of the settings, confirmed
    on a random instance of the model's config. parts: those of the layers that have sites, by number. known_tokens:
    those that the embedding has rows for. warning: one line about what will work and may not be wanted.
    """

    config: HarvestConfig
    model_id: str
    model_revision: str | None
    base: tuple[str, str | None] | None
    code: dict[str, str]
    quantization: QuantizationSource | None
    model_bytes: int
    attn_implementation: str
    sites: tuple[SiteSpec, ...]
    parts: Mapping[int, Parts]
    tokenizer: Any
    tokenizer_id: str
    special: SpecialIds
    text: Text
    known_tokens: KnownTokens
    warning: str | None


def make_request(config: HarvestConfig, runs_model: bool = True, finished: DatasetSource | None = None) -> Request:
    """Find the model, sites, tokenizer and text that `config` names.

    runs_model: the model will run on this machine, so that what this needs is checked too. finished: the text that
    finished tokens were made from, which is then not needed. Raises NotFoundError if the
    model or the text does not exist, and UsageError if a site is not in the model, the tokenizer or the text cannot be
    used, `context_size` exceeds the model's table of positions, or the model cannot run here.
    """
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
        skip_bad=config.bad_rows == "skip",
        split_into=config.split_documents,
        weights=config.weights,
        finished=finished,
    )
    trusted = config.trust_remote_code
    files = find_model(config.model, config.revision, weights=False, code=trusted)
    if config.dtype == "auto":
        config = HarvestConfig(**config.model_dump() | {"dtype": checkpoint_dtype(files)})
    if runs_model:
        check_files(files, config.dtype, config.device, config.device_map)
    code = trusted_code(files, trusted)
    meta = load_meta(config.model, config.revision, config.attn_implementation, trusted)
    warning = positions_of(meta).check(config.context_size)
    sites, parts = resolve_with_parts(meta, config.sites)
    tokenizer = load_tokenizer(config.model, config.revision, trusted)
    special, known_tokens = special_ids(tokenizer), KnownTokens(tokenizer, _embedding_rows(meta))
    known_tokens.check_special(special)
    return Request(
        config=config,
        model_id=files.id,
        model_revision=files.revision,
        base=(files.base.id, files.base.revision) if files.base else None,
        code=code,
        quantization=recorded(declared_quantisation(files)),
        model_bytes=sum(p.numel() for p in meta.parameters()) * DTYPE_BYTES[config.dtype],
        attn_implementation=meta.config._attn_implementation,
        sites=sites,
        parts=parts,
        tokenizer=tokenizer,
        tokenizer_id=files.tokenizer.id,
        special=special,
        text=text,
        known_tokens=known_tokens,
        warning=warning,
    )


def _embedding_rows(meta: Any) -> int | None:
    weight = getattr(meta.get_input_embeddings(), "weight", None)
    return None if weight is None else int(weight.shape[0])
