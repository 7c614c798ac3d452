"""What `metadata.gsae` in an SAE's cfg.json holds: how the SAE was trained. Shared by the writer and all readers.

No field is required, so that SAEs of other tools and of earlier versions can be read. A reader that needs a field
checks that it is not None.
"""

import math
from typing import Self

from gsae.settings import Contract


class SAEMetadata(Contract):
    """How an SAE was trained; a field is None if it is unknown."""

    version: str | None = None  # of gsae
    name: str | None = None
    architecture: str | None = None  # with its variant, as in `registry.ARCHITECTURES`
    l1_coefficient: float | None = None  # for inputs scaled to E||x||^2 = 1
    lr: float | None = None
    seed: int | None = None
    init_sha256: str | None = None  # of the weights that training started from; None: random ones
    data_seed: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    rows: int | None = None  # that it was trained on, counted once for each use
    site: str | None = None
    store_digest: str | None = None
    scale: float | None = None  # of the inputs; already folded into the saved weights
    max_norm_multiple: float | None = None  # rows over this multiple of the median norm were left out; 0: none were
    norm_limit: float | None = None  # the same limit as a norm; None: no limit
    dead: float | None = None  # share of latents that did not fire on the last `dead_rows` rows
    dead_rows: int | None = None
    precision: str | None = None
    diverged: int | None = None  # step at which it last diverged; None: it never did
    diverged_because: str | None = None
    stopped: int | None = None  # step at which it was stopped; its weights are those of step `steps`
    retries: list[dict[str, int]] | None = None  # steps at which it went back, and the steps it went back to

    @classmethod
    def finite(cls, **values: object) -> Self:
        """Make it from values; infinite floats and NaN, for which JSON has no number, become None."""
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        return cls.model_validate(known)

    def noted(self) -> dict[str, object]:
        """The fields that were set, in order, for cfg.json."""
        return self.model_dump(exclude_unset=True)
