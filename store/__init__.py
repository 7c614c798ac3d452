"""The on-disk format: plan, order, codecs, shard writer, memory-mapped reader, verification.

Knows nothing of language models, of what tokens mean, or of SAEs. Importing it registers the Zarr data type
`bfloat16` and the codec `gsae.planes` with zarr-python, so that a plain `zarr.open(STORE)` reads a store.
"""

from . import contexts, order, publish, writer
from .batches import Batches
from .cache import Cache, Fetched
from .chunks import encoded_bytes, unsigned
from .copy import Copied, copy
from .errors import (
    CorruptError,
    GsaeError,
    IncompatibleError,
    InterruptedRun,
    NotFoundError,
    RemoteError,
    SpaceError,
    UsageError,
)
from .foreign import foreign_files
from .info import describe
from .kernels import scatter
from .listing import Listed, list_stores
from .manifest import all_windows
from .moments import Moments, Summary
from .order import SPLITS, Split
from .plan import (
    DTYPE_BYTES,
    SCHEMA_VERSION,
    ContextsSpec,
    DatasetSource,
    ModelSource,
    Plan,
    SiteSpec,
    TokenizerSource,
    changed_fields,
    chunk_rows,
)
from .reader import Store, is_complete, open_store
from .seal import seal
from .several import StoreSet, open_stores
from .shards import all_cores
from .shared import SharedBatches
from .site import Site
from .streaming import empty_rows
from .tokens import (
    TokensMade,
    TokensPlan,
    read_tokens,
    write_tokens_made,
    write_tokens_plan,
)
from .verify import Checked, verify
from .zarr_types import register

__all__ = [
    "DTYPE_BYTES",
    "SCHEMA_VERSION",
    "SPLITS",
    "Batches",
    "Cache",
    "Checked",
    "ContextsSpec",
    "Copied",
    "CorruptError",
    "DatasetSource",
    "Fetched",
    "GsaeError",
    "IncompatibleError",
    "InterruptedRun",
    "Listed",
    "ModelSource",
    "Moments",
    "NotFoundError",
    "Plan",
    "RemoteError",
    "SharedBatches",
    "Site",
    "SiteSpec",
    "SpaceError",
    "Split",
    "Store",
    "StoreSet",
    "Summary",
    "TokenizerSource",
    "TokensMade",
    "TokensPlan",
    "UsageError",
    "all_cores",
    "all_windows",
    "changed_fields",
    "chunk_rows",
    "contexts",
    "copy",
    "describe",
    "empty_rows",
    "encoded_bytes",
    "foreign_files",
    "is_complete",
    "list_stores",
    "open_store",
    "open_stores",
    "order",
    "publish",
    "read_tokens",
    "scatter",
    "seal",
    "unsigned",
    "verify",
    "write_tokens_made",
    "write_tokens_plan",
    "writer",
]

register()
