"""The plan of a store: every value that determines its bytes, written before anything else.

A harvest that resumes must have the same plan, so all of a store is made with the same settings. What does not change
bytes (the folder, the number of workers, the progress display) is not in the plan.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gsae.store.codec.registry import CodecName

from .json_files import SCHEMA_VERSION, Count, OmitsDefaults, Positive, Sha256, StoredValue, Text

# The version of a plan that says more of how the weights came than version 1.0 can.
WEIGHTS_SCHEMA_VERSION = "1.1"
# The version of a plan that says more of the text than version 1.1 can.
TEXT_SCHEMA_VERSION = "1.2"
MAX_CHUNK_BYTES = 4 << 20
# What a reader accepts: far above what is ever written, and low enough that a forged plan costs no memory.
READABLE_CHUNK_BYTES = 64 << 20
READABLE_CHUNKS = 1 << 20
READABLE_WINDOWS = 1 << 17
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=200)]
Dtype = Literal["bfloat16", "float16", "float32"]


class SiteSpec(StoredValue):
    """A site of the language model: the hooked module, the site's name in TransformerLens, and the width of a row."""

    name: Text
    folder: FolderName
    module: Text
    hook: Literal["in", "out"]
    hook_name: Text
    d_in: Annotated[int, Field(ge=1, le=2**20)]

    @model_validator(mode="after")
    def _folder_is_a_name(self) -> Self:
        if self.folder in {".", "..", "source", "zarr.json"}:
            raise ValueError(f"folder {self.folder!r} of site {self.name!r} is reserved")
        return self


class BaseSource(StoredValue):
    """The model that an adapter was merged into."""

    id: Text
    revision: Text | None
    weights_sha256: Sha256


class QuantizationSource(OmitsDefaults):
    """How the weights of a model were quantised, as its config says; sha256: of that part of the config, as JSON.

    dequantized: the loader turned them back into the dtype of the model.
    """

    method: Text
    sha256: Sha256
    dequantized: bool = False


class ModelSource(OmitsDefaults):
    """The language model and how it was run.

    base, adapter_sha256: if an adapter was merged into a base; `id` and `revision` are then those of the adapter, and
    `weights_sha256` is a hash over those of the base and the adapter. code: the sha256 of each Python file of the model
    that transformers ran, by its path in the model's folder.
    """

    id: Text
    revision: Text | None
    weights_sha256: Sha256
    dtype: Dtype
    attn_implementation: Text
    accelerator: Text
    threads: int | None
    device_map: Text | None = None
    compile: bool = False
    base: BaseSource | None = None
    adapter_sha256: Sha256 | None = None
    code: dict[Text, Sha256] = Field(default={})
    quantization: QuantizationSource | None = None

    @property
    def schema_version(self) -> str:
        """The lowest version of the format that has all fields in use."""
        return WEIGHTS_SCHEMA_VERSION if self.base or self.code or self.quantization else SCHEMA_VERSION


class TokenizerSource(StoredValue):
    """The tokenizer; `excluded_ids` are the special tokens that never become rows, ascending."""

    id: Text
    sha256: Sha256
    bos_id: TokenId | None
    eos_id: TokenId
    excluded_ids: tuple[TokenId, ...]


class DatasetSource(OmitsDefaults):
    """The text: which of its documents, in which order.

    text_field: the field that holds the text or, if `tokenised`, the token ids. skip_documents, max_documents: the
    documents left out at the beginning, and how many are taken after them. shuffle_seed: the seed of the documents'
    order; None keeps the order of the source. shuffle_within: documents are permuted in blocks of this many; None
    permutes all. repeat: the text is read again when it ends. files: the sha256 of each file of a text of several, by
    its path below the folder of the text; `sha256` is then a hash over these. split_documents: documents are cut at
    blank lines, or to so many characters. mixed, weights: the texts that this one is interleaved from.
    """

    id: Text
    revision: Text | None
    split: Text
    text_field: Text
    sha256: Sha256 | None
    skip_documents: Count = 0
    max_documents: Positive | None = None
    tokenised: bool = False
    shuffle_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    shuffle_within: Positive | None = None
    repeat: bool = False
    files: dict[Text, Sha256] = Field(default={})
    split_documents: Positive | Literal["blank-lines"] | None = None
    mixed: tuple[Self, ...] | None = None
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None

    @property
    def schema_version(self) -> str:
        """The lowest version of the format that has all fields in use."""
        return TEXT_SCHEMA_VERSION if self.files or self.split_documents or self.mixed else SCHEMA_VERSION


class BadRows(StoredValue):
    """The rows of the text that were left out because they hold no text; first: what is wrong with the first ones."""

    count: Positive
    first: Annotated[tuple[Text, ...], Field(min_length=1)]


class ContextsSpec(OmitsDefaults):
    """The tokens under `contexts/` and `documents/`: their sizes, and the sha256 of their raw arrays.

    bad_rows: those of the text that gave no document, if any.
    """

    contexts: Positive
    context_size: Annotated[int, Field(ge=2, le=2**24)]
    documents: Positive
    ended_early: bool
    tokens_sha256: Sha256
    split_sha256: Sha256
    documents_sha256: Sha256
    bad_rows: BadRows | None = None

    @property
    def schema_version(self) -> str:
        """The lowest version of the format that has all fields in use."""
        return TEXT_SCHEMA_VERSION if self.bad_rows else SCHEMA_VERSION


class Plan(OmitsDefaults):
    """Everything that determines the bytes of a store. parent: the digest of the store that this one is a part of."""

    schema_version: Annotated[str, Field(pattern=r"^[0-9]{1,9}\.[0-9]{1,9}$")]
    model: ModelSource
    tokenizer: TokenizerSource
    dataset: DatasetSource
    contexts: ContextsSpec
    sites: Annotated[tuple[SiteSpec, ...], Field(min_length=1)]
    requested_rows: Positive | None
    rows: Positive
    heldout_rows: Count
    heldout: Annotated[float, Field(ge=0, lt=1)]
    dropped_positions: tuple[Count, ...]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    window_rows: Positive
    chunk_rows: Positive
    batch_size: Positive
    codec: CodecName
    level: Annotated[int, Field(ge=0, le=22)]
    versions: dict[str, str]
    parent: Sha256 | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.window_rows % self.chunk_rows:
            raise ValueError(f"chunk_rows {self.chunk_rows} does not divide window_rows {self.window_rows}")
        names, folders = {s.name for s in self.sites}, {s.folder for s in self.sites}
        if min(len(names), len(folders)) < len(self.sites):
            raise ValueError("two sites have the same name or folder")
        return self

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        widest = max(8, *(site.d_in * DTYPE_BYTES[self.model.dtype] for site in self.sites))
        if self.chunk_rows * widest > READABLE_CHUNK_BYTES:
            raise ValueError(f"a chunk of {self.chunk_rows} rows of {widest} bytes is over {READABLE_CHUNK_BYTES}")
        if self.window_rows // self.chunk_rows > READABLE_CHUNKS:
            raise ValueError(f"a window of {self.window_rows // self.chunk_rows} chunks is over {READABLE_CHUNKS}")
        if self.windows + self.heldout_windows > READABLE_WINDOWS:
            raise ValueError(f"{self.windows + self.heldout_windows} windows are over {READABLE_WINDOWS}")
        return self

    @property
    def context_size(self) -> int:
        """Tokens in a context, BOS included."""
        return self.contexts.context_size

    @property
    def windows(self) -> int:
        """Number of train windows."""
        return -(-self.rows // self.window_rows)

    @property
    def heldout_windows(self) -> int:
        """Number of held-out windows."""
        return -(-self.heldout_rows // self.window_rows)

    def semantic(self) -> dict[str, Any]:
        """Return the fields that define the rows, without those for their encoding and the software's versions."""
        return self.model_dump(mode="json", exclude={"codec", "level", "versions"})


def chunk_rows(widest: int, dtype: str, window_rows: int) -> int:
    """Return the largest power of two of rows that keeps the widest site's chunk within 4 MiB and fits a window."""
    fitting = max(MAX_CHUNK_BYTES // (widest * DTYPE_BYTES[dtype]), 1)
    return min(1 << (fitting.bit_length() - 1), window_rows)


def changed_fields(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List (dotted field, theirs, ours) for each field in which two plans differ."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((prefix + key, b, a))
    return found
