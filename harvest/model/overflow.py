"""Confirming sites on a model that may overflow: its layers give NaNs, so a failed test says nothing about the site.

Costs one more pass over a few tokens, and only after a test failed.
"""

from collections.abc import Mapping, Sequence

from gsae.errors import SpaceError, UsageError
from gsae.store import SiteSpec

from .capture import LanguageModel
from .confirm import confirm
from .layer_parts import Parts
from .layer_trace import CONTEXTS, TOKENS, trace_decoder
from .pass_errors import is_out_of_memory


def confirm_loaded(lm: LanguageModel, sites: Sequence[SiteSpec], parts: Mapping[int, Parts]) -> None:
    """Test sites on a loaded model.

    Raises the UsageError of `confirm`, or one that names the layer that overflows, and SpaceError if even a pass over
    a few tokens does not fit into memory.
    """
    try:
        confirm(lm.model, sites, parts)
    except UsageError as error:
        layer = first_overflow(lm)
        if layer is None:
            raise
        raise UsageError(
            f"Layer {layer} of {type(lm.model).__name__} gives a NaN or an infinity in {lm.provenance.dtype} on a few "
            "test tokens, so the sites cannot be confirmed. Use another --dtype."
        ) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise SpaceError(
                f"A pass over {CONTEXTS * TOKENS} tokens does not fit into the memory of {lm.device} beside the model. "
                "Free memory there, or use --device-map auto."
            ) from None
        raise


def first_overflow(lm: LanguageModel) -> int | None:
    """Return the first layer that gives a NaN or an infinity on a few tokens; None if there is none."""
    try:
        decoder = trace_decoder(lm.model)
    except UsageError:
        return None
    return next((n for n, call in sorted(decoder.calls.items()) if not call.after.isfinite().all()), None)
