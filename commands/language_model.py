"""What `gsae eval` and `gsae features` need of the language model that a store was made with, and the device they use.

Loading it takes seconds to minutes and memory for its weights; nothing here is called with `--no-model`.
"""

from functools import partial
from typing import TYPE_CHECKING

from gsae.errors import UsageError

if TYPE_CHECKING:
    from gsae.evaluate import Effects
    from gsae.features import Vocabulary
    from gsae.store import Store, StoreSet


def load_effects(store: "Store | StoreSet", site: str, model: str | None, device: str, trust: bool) -> "Effects":
    """Load the store's language model and return the function that measures what an edit of a site does to it."""
    from gsae.harvest import effects, load_planned

    lm = load_planned(store.plan.model, model, device, trust)
    return partial(effects, lm, store.site(site).spec)


def load_vocabulary(store: "Store | StoreSet", site: str, model: str | None, device: str, trust: bool) -> "Vocabulary":
    """Load the store's language model and return the texts of its tokens and the effects on its logits."""
    from gsae.features import Vocabulary
    from gsae.harvest import load_planned, logit_effects, token_texts

    lm = load_planned(store.plan.model, model, device, trust)
    return Vocabulary(token_texts(lm.tokenizer), logit_effects(lm, store.site(site).spec))


def torch_device(name: str) -> str:
    """Return torch's name of the device for SAEs: `auto` is a GPU if there is one, else cpu.

    Raises UsageError for Apple's GPU on a machine without one.
    """
    import torch

    from gsae.train import named_device

    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("Device 'mps' cannot be used: torch finds no GPU of Apple's here.")
    return named_device(name)
