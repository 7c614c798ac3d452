"""The on-disk format: plan, order, codecs, shard writer, memory-mapped reader, verification.

Knows nothing of language models, of what tokens mean, or of SAEs. Importing it registers the Zarr data type
`bfloat16` and the codec `gsae.planes` with zarr-python, so that a plain `zarr.open(STORE)` reads a store.
"""

from . import contexts, order, publish, writer
from .batches import Batches
from .errors import (
    CorruptError,
    GsaeError,
    IncompatibleError,
    InterruptedRun,
    NotFoundError,
    SpaceError,
    UsageError,
)
from .info import describe
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
from .reader import Site, Store, is_complete, open_store
from .verify import Checked, verify
from .zarr_types import register

__all__ = [
    "DTYPE_BYTES",
    "SCHEMA_VERSION",
    "SPLITS",
    "Batches",
    "Checked",
    "ContextsSpec",
    "CorruptError",
    "DatasetSource",
    "GsaeError",
    "IncompatibleError",
    "InterruptedRun",
    "ModelSource",
    "Moments",
    "NotFoundError",
    "Plan",
    "Site",
    "SiteSpec",
    "SpaceError",
    "Split",
    "Store",
    "Summary",
    "TokenizerSource",
    "UsageError",
    "changed_fields",
    "chunk_rows",
    "contexts",
    "describe",
    "is_complete",
    "open_store",
    "order",
    "publish",
    "verify",
    "writer",
]

register()
