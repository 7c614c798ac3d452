"""Confirming sites on a model that overflows: its layers give NaNs, so a test that fails says nothing about the site.

Costs one more pass over a few tokens, and only after a test failed.
"""

from collections.abc import Mapping, Sequence

from gsae.errors import UsageError
from gsae.store import SiteSpec

from .capture import LanguageModel
from .confirm import confirm
from .layer_parts import Parts
from .layer_trace import trace_decoder


def confirm_finite(
    lm: LanguageModel, sites: Sequence[SiteSpec], parts: Mapping[int, Parts]
) -> dict[str, tuple[str, ...]]:
    """Return what `confirm` returns. Raises its UsageError, or one that names the layer that overflows."""
    try:
        return confirm(lm.model, sites, parts)
    except UsageError as error:
        layer = first_overflow(lm)
        if layer is None:
            raise
        raise UsageError(
            f"Layer {layer} of {type(lm.model).__name__} gives a NaN or an infinity in {lm.provenance.dtype} on a few "
            "test tokens, so the sites cannot be confirmed. Use another --dtype."
        ) from error


def first_overflow(lm: LanguageModel) -> int | None:
    """Return the first layer that gives a NaN or an infinity on a few tokens; None if there is none."""
    try:
        decoder = trace_decoder(lm.model)
    except UsageError:
        return None
    return next((n for n, call in sorted(decoder.calls.items()) if not call.after.isfinite().all()), None)
