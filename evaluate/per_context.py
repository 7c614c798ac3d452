"""The sums by context of eval.json, from which `gsae report` redraws contexts for the interval of its L0 ratio.

More than MAX_SUMS contexts are added up in groups of neighbours, so that the file does not grow with the store.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .eval_json import PerContext, Sums
from .measurement import Measurement
from .splice import CLEAN, MEAN, ZERO
from .spliced_contexts import SplicedContexts

MAX_SUMS = 2048


def per_context(name: str, measured: Measurement, spliced: SplicedContexts | None) -> PerContext:
    """Return the sums of one SAE. Contexts that did not run through the language model count 0 there."""
    inputs, sums = measured.inputs.columns, measured.saes[name].sums.columns
    rows, l0 = (column.astype(np.int64) for column in (inputs["rows"], sums["l0"]))
    columns: dict[str, NDArray[Any]] = {"rows": rows, "l0": l0, "sse": sums["sse"], "sst": inputs["sst"]}
    if spliced is not None:
        ran = np.searchsorted(measured.contexts, spliced.numbers)
        model = spliced.sums
        conditions = {"clean": CLEAN, "spliced": model.condition(name), "zero": ZERO, "mean": MEAN}
        ran_columns = {"tokens": model.tokens} | {key: model.loss[row] for key, row in conditions.items()}
        for key, values in ran_columns.items():
            columns[key] = np.zeros(len(measured.contexts), values.dtype)
            columns[key][ran] = values
    return PerContext(**{key: _sum_groups(column) for key, column in columns.items()})


def _sum_groups(column: NDArray[Any]) -> Sums:
    """Return the sums of at most MAX_SUMS groups of a column, None where one is not finite (an SAE that diverged)."""
    groups = min(len(column), MAX_SUMS)
    sums = np.add.reduceat(column, np.arange(groups) * len(column) // groups)
    return sums.tolist() if np.isfinite(sums).all() else None
