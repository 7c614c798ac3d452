"""How good the SAEs of a run are, on rows held out from training, and the report that shows it.

`evaluate` writes an eval.json for each SAE, `report` an HTML file from them, `summary` the ratio of L0 at equal score.
The language model comes in as a callable, so nothing here imports one.
"""

from .evaluation import Progress, Trained, common_input, evaluate, sae_folders, site_of
from .metrics import row_norms
from .report.pareto import summary
from .report.png import figures
from .report.report import report
from .splice import Edit, Effects

__all__ = [
    "Edit",
    "Effects",
    "Progress",
    "Trained",
    "common_input",
    "evaluate",
    "figures",
    "report",
    "row_norms",
    "sae_folders",
    "site_of",
    "summary",
]
