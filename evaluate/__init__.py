"""How good the SAEs of a run are, on rows held out from training, and the report that shows it.

`evaluate` writes an eval.json for each SAE, `report` an HTML file from them, `summary` the ratio of L0 at equal
score; `find_features` describes every latent, `build_browser` and `build_blind` show them; `to_dictionary_learning`
passes an SAE on. The language model comes in as a callable, so nothing here imports one.
"""

from .blind import build_blind, compare_ratings, ratings_of
from .browser import build_browser
from .delphi import to_delphi
from .evaluation import Progress, evaluate, site_of
from .export import to_dictionary_learning
from .features import Words, find_features
from .figures import figures
from .neuronpedia import to_neuronpedia
from .pareto import summary
from .portrait import Kept
from .report import report
from .serving import serve
from .splice import Edit, Effects

__all__ = [
    "Edit",
    "Effects",
    "Kept",
    "Progress",
    "Words",
    "build_blind",
    "build_browser",
    "compare_ratings",
    "evaluate",
    "figures",
    "find_features",
    "ratings_of",
    "report",
    "serve",
    "site_of",
    "summary",
    "to_delphi",
    "to_dictionary_learning",
    "to_neuronpedia",
]
