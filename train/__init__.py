"""Gated and baseline SAEs fitted from a store: the formulas, a fast exact step, sweeps, resumable runs.

Training needs the store only: neither the language model nor the text, so transformers and datasets are not imported.
`import gsae.train` imports none of it: the first use of a name does (`facade.py`), and that of the settings needs no
torch.
"""

from typing import TYPE_CHECKING

from gsae.lazy import exports_of

from .run.config import RunConfig as RunConfig

if TYPE_CHECKING:
    from .facade import *  # noqa: F403 (facade.py has __all__)
else:
    __getattr__ = exports_of(__name__)
