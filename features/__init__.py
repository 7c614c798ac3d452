"""What the latents of an SAE fire on: found and described, shown in a browser, exported to other projects.

`find_features` describes every latent, `build_browser` and `build_blind` show them, and `export_sae` writes them, or
the SAE, in a format of `EXPORTS`. The language model is passed in as a `Vocabulary`, so nothing here imports one.

`import gsae.features` imports none of it: the first use of a name does (`facade.py`), and that of the settings needs no
torch.
"""

from typing import TYPE_CHECKING

from gsae.lazy import exports_of

from .browse.settings import BlindSettings as BlindSettings
from .find.settings import FeatureSettings as FeatureSettings

if TYPE_CHECKING:
    from .facade import *  # noqa: F403 (facade.py has __all__)
else:
    __getattr__ = exports_of(__name__)
