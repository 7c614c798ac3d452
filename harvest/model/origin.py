"""Where a loaded model comes from, with everything that may be omitted from a plan: the base of an adapter,
code, quantisation.

It adds to what `capture.py` records of every model. Importing costs nothing more.
"""

from dataclasses import dataclass, field

from gsae.store import BaseSource, QuantizationSource

from .capture import Provenance


@dataclass(frozen=True)
class Origin(Provenance):
    """The provenance of a model, and how its weights came.

    base, adapter_sha256: if an adapter was merged. code: the sha256 of each file of the model's own code that ran.
    quantization: if the checkpoint is quantised.
    """

    base: BaseSource | None = None
    adapter_sha256: str | None = None
    code: dict[str, str] = field(default_factory=dict)
    quantization: QuantizationSource | None = None
