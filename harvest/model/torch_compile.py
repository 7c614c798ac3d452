"""`--compile`: torch.compile for the decoder layers, with an error if part of them would run uncompiled.

The largest modules without a site inside are compiled, each by its `forward`, so the hooks at the sites and the
exception that ends a pass stay outside compiled code. Each batch size is compiled separately and as a whole, so the
bits of a batch do not depend on the sizes before it. The cost is one compilation for each kind of module and batch
size.
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

from .capture import SUM, LanguageModel
from .layer_trace import trace_decoder

# Compiled variants of one module's code: batch sizes, times kinds of layers (Gemma has two kinds of attention).
VARIANTS = 256


def compile_layers(
    lm: LanguageModel, sites: Sequence[SiteSpec], backend: str | Callable[..., Any] = "inductor"
) -> LanguageModel:
    """Compile in place the decoder layers of a model that captures `sites`; return it with that in its provenance.

    backend: of torch.compile. Raises UsageError, here or at the first pass, if a module cannot be compiled as a whole.
    """
    sites_inside = {path for site in sites for path in site.module.split(SUM)}
    decoder = trace_decoder(lm.model)
    for number, layer in enumerate(decoder.layers):
        for module in _without(layer, f"{decoder.path}.{number}", sites_inside):
            module.forward = _compile_whole(lm, module.forward, backend)
    return replace(lm, provenance=replace(lm.provenance, compile=True))


def _without(module: nn.Module, path: str, hooked: set[str]) -> Iterator[nn.Module]:
    """Yield the largest modules, `module` or modules in it, without any of the paths `hooked` strictly inside."""
    if not any(other.startswith(f"{path}.") for other in hooked):
        yield module
        return
    for name, child in module.named_children():
        yield from _without(child, f"{path}.{name}", hooked)


def _compile_whole(
    lm: LanguageModel, forward: Callable[..., Any], backend: str | Callable[..., Any]
) -> Callable[..., Any]:
    """Return `forward` compiled as one graph for each shape."""
    import torch._dynamo as dynamo

    inner = torch.compile(forward, backend=backend, dynamic=False, fullgraph=True)

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            # Torch's own limit is eight variants; the ninth would be an error.
            with dynamo.config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS):
                return inner(*args, **kwargs)
        except dynamo.exc.TorchDynamoException as error:
            what = f"{type(error).__name__}: {one_line(error)}"
            raise UsageError(f"Model {lm.provenance.id!r} cannot be compiled ({what}). Leave out --compile.") from None

    return call
