"""How good the SAEs of a run are, on rows held out from training, and the report that shows it.

`evaluate` writes an eval.json for each SAE, `report` an HTML file from them, and `summary` gives the ratio of L0 at
equal score. The language model is passed in as a callable, so nothing here imports one.
"""

from .eval_json import Evaluation, read_evaluation, read_evaluations
from .evaluation import evaluate
from .events import Listen, Progress, ignore
from .heldout_documents import HeldoutDocuments, few_documents
from .metrics import row_norms
from .report.comparison import summary
from .report.png import write_plots
from .report.public_names import public_name
from .report.report import report
from .run_saes import check_run, load_saes, rows_of_split, sae_folders, site_of
from .splice import Edit, Effects

__all__ = [
    "Edit",
    "Effects",
    "Evaluation",
    "HeldoutDocuments",
    "Listen",
    "Progress",
    "check_run",
    "evaluate",
    "few_documents",
    "ignore",
    "load_saes",
    "public_name",
    "read_evaluation",
    "read_evaluations",
    "report",
    "row_norms",
    "rows_of_split",
    "sae_folders",
    "site_of",
    "summary",
    "write_plots",
]
