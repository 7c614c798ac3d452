"""The store: its format on disk, codecs, writer, reader, copies and verification.

It knows nothing of language models, the meaning of tokens, or SAEs. Importing it registers the Zarr data type
`bfloat16` and the codec `gsae.planes` with zarr-python, so that `zarr.open(STORE)` reads a store.
"""

from .codec.chunks import encoded_bytes, unsigned
from .codec.registry import row_codec
from .codec.scatter import empty_rows, scatter
from .codec.zarr_plugin import register
from .format.json_files import SCHEMA_VERSION
from .format.manifest import Record, WindowTotals, all_windows
from .format.moments import Moments, Summary
from .format.plan import (
    DTYPE_BYTES,
    BadRows,
    BaseSource,
    ContextsSpec,
    DatasetSource,
    ModelSource,
    Plan,
    QuantizationSource,
    SiteSpec,
    TokenizerSource,
    changed_fields,
    chunk_rows,
)
from .format.row_order import (
    SPLITS,
    Layout,
    Split,
    Stream,
    context_batches,
    inverse,
    layout,
    permutation,
    row_mask,
    stored_order,
    word,
)
from .manage.copy import CopyProgress, copy
from .manage.describe import describe
from .manage.listing import StoreSummary, list_stores
from .manage.nonfinite_rows import listed_shares, nonfinite_note, nonfinite_rows
from .manage.seal import seal
from .manage.verify import VerifyProgress, verify
from .manage.verify_foreign import foreign_files
from .places.cache import Cache, FetchedFile
from .places.pending_tokens import TokensMade, TokensPlan, read_tokens, write_tokens_made, write_tokens_plan
from .read.batches import Batches
from .read.contexts_reader import read_contexts
from .read.reading import ReadOptions
from .read.site import Site
from .read.store import Store, is_complete, open_store
from .read.store_set import StoreSet, open_stores
from .write.contexts_writer import write_contexts
from .write.shard_writer import all_cores
from .write.window_writer import (
    CONFIRMED,
    EncodedWindow,
    encode_window,
    read_plan,
    unfinished,
    write_confirmed,
    write_manifest,
    write_plan,
)

__all__ = [
    "CONFIRMED",
    "DTYPE_BYTES",
    "SCHEMA_VERSION",
    "SPLITS",
    "BadRows",
    "BaseSource",
    "Batches",
    "Cache",
    "ContextsSpec",
    "CopyProgress",
    "DatasetSource",
    "EncodedWindow",
    "FetchedFile",
    "Layout",
    "ModelSource",
    "Moments",
    "Plan",
    "QuantizationSource",
    "ReadOptions",
    "Record",
    "Site",
    "SiteSpec",
    "Split",
    "Store",
    "StoreSet",
    "StoreSummary",
    "Stream",
    "Summary",
    "TokenizerSource",
    "TokensMade",
    "TokensPlan",
    "VerifyProgress",
    "WindowTotals",
    "all_cores",
    "all_windows",
    "changed_fields",
    "chunk_rows",
    "context_batches",
    "copy",
    "describe",
    "empty_rows",
    "encode_window",
    "encoded_bytes",
    "foreign_files",
    "inverse",
    "is_complete",
    "layout",
    "list_stores",
    "listed_shares",
    "nonfinite_note",
    "nonfinite_rows",
    "open_store",
    "open_stores",
    "permutation",
    "read_contexts",
    "read_plan",
    "read_tokens",
    "row_codec",
    "row_mask",
    "scatter",
    "seal",
    "stored_order",
    "unfinished",
    "unsigned",
    "verify",
    "word",
    "write_confirmed",
    "write_contexts",
    "write_manifest",
    "write_plan",
    "write_tokens_made",
    "write_tokens_plan",
]

register()
