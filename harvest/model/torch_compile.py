"""`--compile`: torch.compile of exactly what a harvest runs, and an error where it would silently not be used.

The largest modules of the decoder layers that have no site inside are compiled, each by its `forward`: so the hooks at
the sites, and the exception that ends a pass, stay outside of compiled code. Each batch size is compiled by itself,
whole or not at all: then the bits of a batch do not depend on which sizes came before. It costs a compilation for
each kind of module and batch size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import nn

from gsae.errors import UsageError
from gsae.harvest.hub import one_line
from gsae.store import SiteSpec

from .capture import LanguageModel
from .sites import layers

# Variants of one module's code that may be compiled: batch sizes, times layers that differ (Gemma's two attentions).
VARIANTS = 256


def compiled(
    lm: LanguageModel, sites: Sequence[SiteSpec], backend: str | Callable[..., Any] = "inductor"
) -> LanguageModel:
    """Compile, in place, what passes to `sites` run, and return the model as one that says so.

    backend: torch.compile's. Raises UsageError, here or at the first pass, where the model cannot be compiled whole.
    """
    hooked = {site.module for site in sites}
    for path, layer in layers(lm.model).items():
        for module in _without(layer, path, hooked):
            module.forward = _whole(lm, module.forward, backend)
    return replace(lm, source=replace(lm.source, compile=True))


def _without(module: nn.Module, path: str, hooked: set[str]) -> Iterator[nn.Module]:
    """Yield the largest modules, `module` itself or inside it, that have none of the `hooked` strictly inside."""
    if not any(other.startswith(f"{path}.") for other in hooked):
        yield module
        return
    for name, child in module.named_children():
        yield from _without(child, f"{path}.{name}", hooked)


def _whole(lm: LanguageModel, forward: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` compiled in one piece for each shape."""
    import torch._dynamo as dynamo

    inner = torch.compile(forward, backend=backend, dynamic=False, fullgraph=True)

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            # At torch's limit of eight variants the next one is an error; more would be run uncompiled.
            with dynamo.config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS):
                return inner(*args, **kwargs)
        except dynamo.exc.TorchDynamoException as error:
            what = f"{type(error).__name__}: {one_line(error)}"
            raise UsageError(f"Model {lm.source.id!r} cannot be compiled ({what}). Leave out --compile.") from None

    return call
