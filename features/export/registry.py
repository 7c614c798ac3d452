"""The formats that an SAE or its features can be exported to. A new format is a file of this folder and a line here."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gsae.errors import UsageError
from gsae.evaluate import Listen, ignore
from gsae.settings import unknown

from . import delphi, dictionary_learning, neuronpedia
from .source import ExportSource

Export = Callable[[ExportSource, Path, Listen], Path]
"""Writes a source below the folder that the user named; returns the folder that the other project reads."""

EXPORTS: Mapping[str, Export] = {
    "dictionary_learning": dictionary_learning.export,
    "delphi": delphi.export,
    "neuronpedia": neuronpedia.export,
}


def export_sae(path: Path, out: Path, form: str, *, stores: Sequence[str | Path] = (), listen: Listen = ignore) -> Path:
    """Export the SAE that RUN/NAME (or the folder of a saved SAE) names to `out`, in a format of EXPORTS.

    stores: where the run's stores are, if they have moved. Raises UsageError for an unknown format, and what the
    exporter raises.
    """
    if form not in EXPORTS:
        raise UsageError(unknown("export format", form, EXPORTS))
    return EXPORTS[form](ExportSource.find(path, stores), out, listen)
