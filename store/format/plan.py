"""The plan of a store: every value that determines its bytes, written before the first of them.

A harvest that resumes must have the same plan, so a store can never be half one thing and half another. What does
not change bytes (where to write, how many workers, how to log) is not in it; neither are names, hosts or paths.
"""

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from gsae.errors import CorruptError, IncompatibleError
from gsae.store.codec.chunks import Codec

SCHEMA_VERSION = "1.0"
MAX_CHUNK_BYTES = 4 << 20
# What a reader accepts from elsewhere: far above what is ever written, low enough that a forged plan costs nothing.
READABLE_CHUNK_BYTES = 64 << 20
READABLE_CHUNKS = 1 << 20
READABLE_WINDOWS = 1 << 17
SHOWN_CHARACTERS = 200
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(pattern=r"^\P{Cc}*$", max_length=4096)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Folder = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=200)]
Dtype = Literal["bfloat16", "float16", "float32"]


class Frozen(BaseModel):
    """A value from a file: typed strictly, immutable, and keeping fields that a newer minor version added."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)


T = TypeVar("T", bound=Frozen)


class SiteSpec(Frozen):
    """A place in the language model: what to hook, what others call it, and how wide it is."""

    name: Text
    folder: Folder
    module: Text
    hook: Literal["in", "out"]
    hook_name: Text
    d_in: Annotated[int, Field(ge=1, le=2**20)]

    @model_validator(mode="after")
    def _folder_is_a_name(self) -> Self:
        if self.folder in {".", "..", "source", "zarr.json"}:
            raise ValueError(f"folder {self.folder!r} of site {self.name!r} is reserved")
        return self


class ModelSource(Frozen):
    """The language model and how it ran; the last two are written only where they say something."""

    id: Text
    revision: Text | None
    weights_sha256: Sha256
    dtype: Dtype
    attn_implementation: Text
    accelerator: Text
    threads: int | None
    device_map: Text | None = None
    compile: bool = False

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value or name not in ("device_map", "compile")}


class TokenizerSource(Frozen):
    """The tokenizer; `excluded_ids` are the special tokens that are never rows, ascending."""

    id: Text
    sha256: Sha256
    bos_id: TokenId | None
    eos_id: TokenId
    excluded_ids: tuple[TokenId, ...]


class DatasetSource(Frozen):
    """The text, and which of its documents, in which order.

    text_field: what holds the text or, where it is `tokenised`, the token ids. shuffle_seed: of the documents' order,
    source order if None; shuffle_within: only this many, one after the other, were permuted among themselves.
    `max_documents` were taken after `skip_documents`; `repeat`: again and again. All but the first five are written
    only where they say something.
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

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        absent = {name: field.default for name, field in type(self).model_fields.items() if not field.is_required()}
        return {name: value for name, value in fields.items() if name not in absent or value != absent[name]}


class ContextsSpec(Frozen):
    """The tokens as they stand under `contexts/` and `documents/`, with the sha256 of their raw arrays."""

    contexts: Positive
    context_size: Annotated[int, Field(ge=2, le=2**24)]
    documents: Positive
    ended_early: bool
    tokens_sha256: Sha256
    split_sha256: Sha256
    documents_sha256: Sha256


class Plan(Frozen):
    """Everything that determines the bytes of a store.

    parent: the digest of the store that this one is a part of; the field is written only where there is one.
    """

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
    codec: Codec
    level: Annotated[int, Field(ge=0, le=22)]
    versions: dict[str, str]
    parent: Sha256 | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return fields if self.parent else {name: value for name, value in fields.items() if name != "parent"}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.window_rows % self.chunk_rows:
            raise ValueError(f"chunk_rows {self.chunk_rows} does not divide window_rows {self.window_rows}")
        names, folders = {s.name for s in self.sites}, {s.folder for s in self.sites}
        if min(len(names), len(folders)) < len(self.sites):
            raise ValueError("two sites share a name or a folder")
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
        """Return the fields that say what the rows are, without those that say how they are encoded or by what."""
        return self.model_dump(mode="json", exclude={"codec", "level", "versions"})


def chunk_rows(widest: int, dtype: str, window_rows: int) -> int:
    """Return the largest power of two of rows that keeps the widest site's chunk within 4 MiB and fits a window."""
    fitting = max(MAX_CHUNK_BYTES // (widest * DTYPE_BYTES[dtype]), 1)
    return min(1 << (fitting.bit_length() - 1), window_rows)


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of `value`: sorted keys, no spaces, shortest floats, UTF-8, a final newline."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def sha256(data: bytes) -> str:
    """Return the sha256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def parse(kind: type[T], data: bytes, where: str) -> T:
    """Read a `kind` (plan, record or manifest) from canonical JSON; `where` is named in errors.

    Raises CorruptError when it is not one, or not in canonical form; IncompatibleError when its format is newer.
    """
    try:
        loose = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where} is not JSON: {error}.") from None
    if not isinstance(loose, dict):
        raise CorruptError(f"{where} holds a {type(loose).__name__} where an object is needed.")
    check_schema(loose.get("schema_version"), where)
    try:
        value = kind.model_validate_json(data)
    except ValidationError as error:
        raise CorruptError(f"{where} is not what it should be: {first_fault(error)}.") from None
    if not _is_canonical(value, data):
        raise CorruptError(f"{where} is not in canonical form, so it was changed after it was written.")
    return value


def _is_canonical(value: Frozen, data: bytes) -> bool:
    try:
        return canonical_json(value.model_dump(mode="json")) == data
    except (ValueError, RecursionError):  # an infinity or an endless number in a field that only a newer version knows
        return False


def check_schema(version: Any, where: str) -> None:
    """Refuse a store whose major version is newer than ours (IncompatibleError)."""
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", version):
        found = repr(version)[:SHOWN_CHARACTERS]
        raise CorruptError(f"{where} has no schema_version such as {SCHEMA_VERSION!r}; found {found}.")
    if int(version.split(".")[0]) > int(SCHEMA_VERSION.split(".")[0]):
        raise IncompatibleError(
            f"{where} has format {version}; this gsae reads up to {SCHEMA_VERSION}. Install a newer gsae."
        )


def first_fault(error: ValidationError) -> str:
    """Return the first fault of a pydantic error in one short line, whatever characters are in it."""
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"]) or "the whole"
    line = f"{place}: {fault['msg']}"
    return "".join(c if c.isprintable() else "?" for c in line)[:SHOWN_CHARACTERS]


def changed_fields(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List (dotted field, theirs, ours) wherever two plans differ."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((prefix + key, b, a))
    return found
