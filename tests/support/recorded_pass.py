"""What the modules of a model get and give in a whole pass, seen by plain hooks that share nothing with gsae's own."""

from typing import Any

import torch
from torch import Tensor

Recorded = dict[str, tuple[Any, Any]]


def recorded(model: Any, tokens: Tensor) -> Recorded:
    """Return each module's first input and output in a pass; modules that run more than once are left out."""
    seen: Recorded = {}
    again: set[str] = set()
    handles = []
    for path, module in model.named_modules():

        def keep(module: Any, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            gave = output[0] if isinstance(output, (tuple, list)) else output
            if path in seen:
                again.add(path)
            seen[path] = tuple(v.clone() if isinstance(v, Tensor) else v for v in (given, gave))  # type: ignore[assignment]

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {path: pair for path, pair in seen.items() if path not in again}
