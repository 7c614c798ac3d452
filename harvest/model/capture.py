"""A language model that only runs forward, and catching activations on the way.

A pass that catches activations ends at the last module it needs (an exception leaves it, so no layer after
that runs), and attention gets no mask: it is causal and padding stands at the end.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gsae.errors import UsageError
from gsae.store import SiteSpec


@dataclass(frozen=True)
class Provenance:
    """What ran, and on what. weights_sha256: over the sha256s of the weight files; device_map: as it was asked for."""

    id: str
    revision: str | None
    weights_sha256: str
    tokenizer_sha256: str
    dtype: str
    attn_implementation: str
    accelerator: str
    device_map: str | None = None
    compile: bool = False


@dataclass(frozen=True)
class LanguageModel:
    """A transformers model in evaluation mode, without gradients, with its tokenizer and provenance."""

    model: Any
    tokenizer: Any
    source: Provenance

    @property
    def device(self) -> torch.device:
        """Where the tokens go in."""
        embedding = self.model.get_input_embeddings()
        # Weights that a device map keeps elsewhere are on `meta` until accelerate's hook brings them where they run.
        device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        if device is None:
            device = "cpu" if embedding.weight.is_meta else embedding.weight.device
        return torch.device(device)


def capture(
    lm: LanguageModel, sites: Sequence[SiteSpec], tokens: Tensor, pick: Callable[[Tensor], Tensor] = Tensor.clone
) -> dict[str, Tensor]:
    """Run `tokens` (contexts, context_size) as far as the sites need.

    Returns by site name what `pick` makes of the activations (contexts, context_size, d_in), in the model's dtype and
    on the device where they arise: a copy, for what follows may change them in place. Raises UsageError where the pass
    ends without having met a site.
    """
    found: dict[str, Tensor] = {}
    wanted = {site.name for site in sites}

    def keep(name: str, value: Tensor) -> None:
        with torch.inference_mode(False):  # a plain tensor, which can be trained on
            found[name] = pick(value.detach())
        if wanted <= found.keys():
            raise Complete

    with ExitStack() as hooks, torch.inference_mode():
        for site in sites:
            hooks.enter_context(hooked(lm.model, site, tokens.shape, partial(keep, site.name)))
        try:
            lm.model(input_ids=tokens.to(lm.device, torch.long, non_blocking=True), use_cache=False)
        except Complete:
            return found
    raise UsageError(f"The model's pass never reaches site {min(wanted - found.keys())!r}.")


class Complete(Exception):  # noqa: N818
    """Not an error: the way out of a pass that has served its purpose."""


@contextmanager
def hooked(
    model: nn.Module, site: SiteSpec, shape: torch.Size, change: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """Pass the site's activations (*shape, d_in) to `change` and, where it returns any, go on with those."""

    def changed(value: Tensor) -> Tensor | None:
        new = change(value.reshape(*shape, -1))  # some families (OPT) flatten contexts before their MLP
        return None if new is None else new.reshape(value.shape)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        new = changed(first)
        if new is None:
            return None
        return (new, *rest) if isinstance(output, tuple) else new

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            new = changed(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = next(iter(kwargs))
        new = changed(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    module = model.get_submodule(site.module)
    if site.hook == "out":
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
