"""A loaded language model, and passes that capture the activations at some sites.

A pass ends at the last site, by an exception, so later layers do not run. The model gets no attention mask: attention
is causal, and padding stands only at the end of a context.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gsae.errors import UsageError
from gsae.store import BaseSource, QuantizationSource, SiteSpec

from .layer_trace import input_device
from .module_values import Change, changing_input, changing_output
from .pass_errors import pass_errors

SUM = " + "
"""Between the paths of a site that is the sum of several modules' outputs."""


@dataclass(frozen=True)
class Provenance:
    """Which model ran, and on which hardware.

    weights_sha256: hash over the sha256s of the weight files. device_map: as given in the settings. base,
    adapter_sha256: of an adapter that was merged. code: the sha256 of each file of the model's own code that ran.
    quantization: of a quantised checkpoint.
    """

    id: str
    revision: str | None
    weights_sha256: str
    tokenizer_sha256: str
    dtype: str
    attn_implementation: str
    accelerator: str
    device_map: str | None = None
    compile: bool = False
    base: BaseSource | None = None
    adapter_sha256: str | None = None
    code: dict[str, str] = field(default_factory=dict)
    quantization: QuantizationSource | None = None


@dataclass(frozen=True)
class LanguageModel:
    """A transformers model in evaluation mode, without gradients, with its tokenizer and provenance."""

    model: Any
    tokenizer: Any
    provenance: Provenance

    @property
    def device(self) -> torch.device:
        """The device that takes the tokens."""
        return input_device(self.model)


def capture(
    lm: LanguageModel, sites: Sequence[SiteSpec], tokens: Tensor, pick: Callable[[Tensor], Tensor] = Tensor.clone
) -> dict[str, Tensor]:
    """Run `tokens` (contexts, context_size) up to the last of the sites and return, by site name, what `pick` returns.

    pick: gets the activations (contexts, context_size, d_in) in the model's dtype, on the device where they arise. It
    must copy them, because later code of the model may change them in place. Raises UsageError if the pass ends
    without reaching one of the sites, if the model's code fails for these tokens, and if a site's activations are not
    one vector of `d_in` values for each token.
    """
    found: dict[str, Tensor] = {}
    wanted = {site.name for site in sites}

    def keep(name: str, value: Tensor) -> None:
        with torch.inference_mode(False):  # inference tensors cannot be trained on
            found[name] = pick(value.detach())
        if wanted <= found.keys():
            raise StopPass

    with ExitStack() as hooks, torch.inference_mode():
        for site in sites:
            hooks.enter_context(hooked(lm.model, site, tokens.shape, partial(keep, site.name)))
        try:
            with pass_errors(lm.model, tokens.shape, StopPass):
                lm.model(
                    input_ids=tokens.to(lm.device, torch.long, non_blocking=lm.device.type == "cuda"), use_cache=False
                )
        except StopPass:
            return found
    raise UsageError(f"The model's pass never reaches site {min(wanted - found.keys())!r}.")


class StopPass(Exception):  # noqa: N818
    """Raised in a hook to end a pass early; not an error."""


@contextmanager
def hooked(
    model: nn.Module, site: SiteSpec, shape: torch.Size, change: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `change` with the site's activations (*shape, d_in) in each pass inside the `with`.

    The model continues with the tensor that `change` returns, or with its own activations if that is None. shape:
    (contexts, context_size). Raises UsageError, in the pass, if a site's activations have another shape.
    """
    paths = site.module.split(SUM)
    modules = [model.get_submodule(path) for path in paths]

    def changed(value: Tensor) -> Tensor | None:
        _check_shape(site, value, shape)
        # Some families (OPT) flatten the contexts before their MLP.
        new = change(value.reshape(*shape, site.d_in))
        return None if new is None else new.reshape(value.shape)

    with ExitStack() as hooks:
        if site.hook == "in":
            handle = modules[0].register_forward_pre_hook(changing_input(changed), with_kwargs=True)
            hooks.callback(handle.remove)
        else:
            for module, step in zip(modules, _steps(changed, len(modules)), strict=True):
                hooks.callback(module.register_forward_hook(changing_output(step)).remove)
        yield


def _steps(changed: Change, count: int) -> list[Change]:
    """Return what is done with the outputs of `count` modules, in the order in which they run, to change their sum.

    The last of them gives the sum and the others zeros, so what the model adds up is the sum again.
    """
    if count == 1:
        return [changed]
    parts: list[Tensor] = []

    def step(value: Tensor) -> Tensor | None:
        parts.append(value)
        if len(parts) < count:
            return torch.zeros_like(value)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        parts.clear()
        new = changed(total)
        return total if new is None else new

    return [step] * count


def _check_shape(site: SiteSpec, value: Any, shape: torch.Size) -> None:
    """Raise UsageError unless a value has one vector of the site's width for each token."""
    wanted = (*shape, site.d_in)
    found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if found not in (wanted, (shape.numel(), site.d_in)):
        raise UsageError(f"Site {site.name!r}: module {site.module!r} gives {found} in this pass; {wanted} is needed.")
