"""Text to contexts to activations: everything that needs the language model or the text.

`documents` opens a text, `tokenise` packs it into contexts, `load_lm` loads a model, `resolve` turns site names into
modules of it, and `capture` runs it up to these sites. `harvest` does all of it and writes a store. `effects` measures
edits of a site, `logit_effects` the direct effect of a direction. Imports only the rooms below it (`gsae.store`);
transformers and datasets are imported when they are first used.

`import gsae.harvest` imports none of it: the first use of a name does (`facade.py`), and that of the settings needs no
torch.
"""

from typing import TYPE_CHECKING

from gsae.lazy import exports_of

from .config import HarvestConfig as HarvestConfig

if TYPE_CHECKING:
    from .facade import *  # noqa: F403 (facade.py has __all__)
else:
    __getattr__ = exports_of(__name__)
