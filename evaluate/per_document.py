"""The sums by document of eval.json, from which `gsae report` redraws documents for the interval of its L0 ratio.

More than MAX_SUMS documents are added up in groups of neighbours, so that the file does not grow with the store.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .eval_json import PerDocument, Sums
from .measurement import Measurement
from .splice import CLEAN, MEAN, ZERO
from .spliced_documents import SplicedDocuments

MAX_SUMS = 2048


def per_document(name: str, measured: Measurement, spliced: SplicedDocuments | None) -> PerDocument:
    """Return the sums of one SAE. Documents of which no context ran through the language model count 0 there."""
    inputs, sums = measured.inputs.columns, measured.saes[name].sums.columns
    rows, l0 = (column.astype(np.int64) for column in (inputs["rows"], sums["l0"]))
    columns: dict[str, NDArray[Any]] = {"rows": rows, "l0": l0, "sse": sums["sse"], "sst": inputs["sst"]}
    if spliced is not None:
        model = spliced.sums
        own = model.condition(name)
        conditions = {"clean": CLEAN, "spliced": own, "zero": ZERO, "mean": MEAN}
        ran_columns = {"tokens": model.tokens} | {key: model.loss[row] for key, row in conditions.items()}
        ran_columns |= {"kl_spliced": model.divergence[own], "kl_zero": model.divergence[ZERO]}
        for key, values in ran_columns.items():
            columns[key] = np.zeros(measured.documents, values.dtype)
            columns[key][spliced.documents] = values
    return PerDocument(**{key: _sum_groups(column) for key, column in columns.items()})


def _sum_groups(column: NDArray[Any]) -> Sums:
    """Return the sums of at most MAX_SUMS groups of a column, None where one is not finite (an SAE that diverged)."""
    groups = min(len(column), MAX_SUMS)
    sums = np.add.reduceat(column, np.arange(groups) * len(column) // groups)
    return sums.tolist() if np.isfinite(sums).all() else None
