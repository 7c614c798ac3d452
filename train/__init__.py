"""Gated and baseline SAEs fitted from a store: the formulas, a fast exact step, sweeps, resumable runs.

Training needs the store only: neither the language model nor the text, so transformers and datasets are not imported.
`import gsae.train` imports none of it: the first use of a name does (`facade.py`), and that of the settings needs no
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .run.config import RunConfig as RunConfig

if TYPE_CHECKING:
    from .facade import *  # noqa: F403 (facade.py has __all__)
else:

    def __getattr__(name: str) -> Any:
        """Return an exported name; the first use imports the room."""
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".facade", __name__), name)
