"""Whether a harvest may continue what is in its folder: its settings must be those that the store was begun with.

The plan that the settings would give is compared with the plan on disk, field by field, and every difference is named.
This costs nothing beside making the request.
"""

from pathlib import Path
from typing import Any

from gsae.errors import IncompatibleError
from gsae.store import BaseSource, ModelSource, Plan, QuantizationSource, TokensPlan, changed_fields

from .plans import make_plan, make_tokens_plan
from .request import Request

HARDWARE = ("model.accelerator", "model.threads")
NAMED_CHANGES = 3
SHOWN_CHARACTERS = 200
UNREAD = "0" * 64


def check_same_plan(begun: Plan, request: Request, model: ModelSource | None, out: Path) -> None:
    """Raise IncompatibleError with the changed settings if `begun` is not the plan that `request` would give.

    model: the loaded model; None before it is loaded. The fields that only the weights determine are not checked then.
    """
    config = request.config
    known_without_weights = {
        "id": request.model_id,
        "revision": request.model_revision,
        "dtype": config.dtype,
        "attn_implementation": request.attn_implementation,
        "device_map": config.device_map,
        "compile": config.compile,
        "code": request.code,
        "quantization": _quantization(begun.model.quantization, request.quantization),
        "base": _base(begun.model.base, request.base),
    }
    source = model or begun.model.model_copy(update=known_without_weights)
    contexts = begun.contexts.model_copy(update={"context_size": config.context_size})
    batch_size = begun.batch_size if config.batch_size == "auto" else config.batch_size
    plan = make_plan(request, source, contexts, begun.rows, begun.heldout_rows, batch_size)
    changed = changed_fields(plan.model_dump(mode="json"), begun.model_dump(mode="json"))
    if config.any_hardware:
        changed = [change for change in changed if change[0] not in HARDWARE]
    only_hardware = {field for field, _, _ in changed} <= set(HARDWARE)
    _refuse(changed, out, " Use --any-hardware to continue on this hardware." if only_hardware else "")


def _base(begun: BaseSource | None, asked: tuple[str, str | None] | None) -> BaseSource | None:
    """Return the base that the settings name, with the weights of the begun one, as far as there is one."""
    if asked is None:
        return None
    weights = begun.weights_sha256 if begun else UNREAD
    return BaseSource(id=asked[0], revision=asked[1], weights_sha256=weights)


def _quantization(begun: QuantizationSource | None, asked: QuantizationSource | None) -> QuantizationSource | None:
    """Return the quantisation that the model has, dequantised as the begun one, which only loading decides."""
    return asked and asked.model_copy(update={"dequantized": bool(begun and begun.dequantized)})


def check_same_tokens(begun: TokensPlan, request: Request, out: Path, finished: bool) -> None:
    """Raise IncompatibleError with the changed settings if `begun` is not the tokens plan that `request` would give.

    finished: all tokens are written; the versions of the libraries may then differ, because they are not used again.
    """
    plan = make_tokens_plan(request)
    if finished:
        plan = plan.model_copy(update={"versions": begun.versions})
    _refuse(changed_fields(plan.model_dump(mode="json"), begun.model_dump(mode="json")), out)


def _refuse(changed: list[tuple[str, Any, Any]], out: Path, hint: str = "") -> None:
    if changed:
        named = "; ".join(
            f"{field} was {_shown(was)}, now {_shown(now)}" for field, was, now in changed[:NAMED_CHANGES]
        )
        more = f"; and {len(changed) - NAMED_CHANGES} more" if len(changed) > NAMED_CHANGES else ""
        raise IncompatibleError(
            f"{out} was begun with other settings: {named}{more}. Use the same settings, or another folder.{hint}"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
