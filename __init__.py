"""gsae: run the language model once, then fit Gated sparse autoencoders from its stored activations.

    store = gsae.open_store("STORE")
    site = store.site("mlp.10")
    for x in site.batches(4096, seed=0, epochs=3): ...

The rooms, in the order in which data flows: `gsae.harvest` (text to contexts to activations), `gsae.store`
(the format on disk), `gsae.train` (SAEs fitted from batches), `gsae.evaluate` (metrics and the report).
Importing this package imports none of them.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "open_store"]

if TYPE_CHECKING:
    from gsae.store import open_store


def __getattr__(name: str) -> Any:
    """Import what the tour above names on first use, so that `import gsae` stays instant."""
    if name == "open_store":
        from gsae.store import open_store

        return open_store
    raise AttributeError(f"module 'gsae' has no attribute {name!r}")
