"""How good the SAEs of a run are, on rows held out from training, and the report that shows it.

`evaluate` writes an eval.json for each SAE, `report` an HTML file from them, `summary` the ratio of L0 at equal
score; `to_dictionary_learning` passes an SAE on. The language model comes in as a callable, so nothing here imports
one.
"""

from .evaluation import Progress, evaluate, site_of
from .export import to_dictionary_learning
from .figures import figures
from .pareto import summary
from .report import report
from .splice import Edit, Effects

__all__ = [
    "Edit",
    "Effects",
    "Progress",
    "evaluate",
    "figures",
    "report",
    "site_of",
    "summary",
    "to_dictionary_learning",
]
