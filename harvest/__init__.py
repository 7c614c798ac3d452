"""Text to contexts to activations: everything that needs the language model or the text.

`documents` reads a text, `tokenise` packs it into contexts, `load_lm` finds and loads a model, `resolve` turns site
names into places in it, `capture` runs it as far as the sites need, `effects` measures what an edit there costs and
`logit_effects` which logits a direction there raises. Of other rooms it imports `gsae.store` alone.

`import gsae.harvest` imports none of it: the first use of a name does (`facade.py`), and that of the settings needs no
torch. transformers and datasets are imported by the functions that call them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import HarvestConfig as HarvestConfig

if TYPE_CHECKING:
    from .facade import *  # noqa: F403 (facade.py has __all__)
else:

    def __getattr__(name: str) -> Any:
        """Return an exported name; the first use imports the room."""
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".facade", __name__), name)
