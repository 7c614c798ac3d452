"""A language model that only runs forward: loading it, and catching activations on the way.

A pass that catches activations ends at the last module it needs (an exception leaves it, so no layer after
that runs), and attention gets no mask: it is causal and padding stands at the end.
"""

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gsae.store import IncompatibleError, ModelSource, NotFoundError, SiteSpec, SpaceError, UsageError

from .hub import one_line, quiet
from .models import Source, find, light_directory, weights_directory, weights_sha256


@dataclass(frozen=True)
class Provenance:
    """What ran, and on what. weights_sha256: over the sha256s of the weight files."""

    id: str
    revision: str | None
    weights_sha256: str
    tokenizer_sha256: str
    dtype: str
    attn_implementation: str
    accelerator: str


@dataclass(frozen=True)
class LanguageModel:
    """A transformers model in evaluation mode, without gradients, with its tokenizer and provenance."""

    model: Any
    tokenizer: Any
    source: Provenance

    @property
    def device(self) -> torch.device:
        """Where the tokens go in."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device


def load_lm(
    model: str,
    revision: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
) -> LanguageModel:
    """Load a builtin, a local directory, a `.gguf` file or a Hub id.

    device: torch's name of one, or "auto" for an accelerator where there is one. Raises NotFoundError where
    there is no such model, UsageError where it or the device cannot be used, SpaceError where it does not
    fit.
    """
    place = _device(device)
    source = find(model, revision, weights=True)
    tokenizer = _tokenizer(source)
    weights = weights_sha256(source)
    directory = weights_directory(source, dtype)
    with _told(source), quiet(bars=False):
        from transformers import AutoModelForCausalLM

        answer: Any = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            local_files_only=True,
            output_loading_info=True,
        )
    loaded, report = answer
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if lacking:  # transformers would fill them with random numbers
        raise UsageError(f"The weights of model {source.id!r} lack {len(lacking)} tensors, such as {lacking[0]}.")
    with _told(source):
        loaded = loaded.to(place).eval().requires_grad_(False)
    provenance = Provenance(
        source.id,
        source.revision,
        weights,
        tokenizer_sha256(tokenizer),
        dtype,
        attn_implementation,
        accelerator(place),
    )
    return LanguageModel(loaded, tokenizer, provenance)


def load_planned(planned: ModelSource, model: str | None, device: str = "cpu") -> LanguageModel:
    """Load the model that a store was made with, as it ran then.

    model: where it is; None for the store's own name of it. Raises IncompatibleError where its weights are others,
    and what `load_lm` raises.
    """
    lm = load_lm(model or planned.id, planned.revision, planned.dtype, device, planned.attn_implementation)
    if lm.source.weights_sha256 != planned.weights_sha256:
        raise IncompatibleError(
            f"Model {model or planned.id!r} has other weights than the one the store was made with ({planned.id})."
        )
    return lm


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """Load only the tokenizer of a model. Raises UsageError where the model has none."""
    return _tokenizer(find(model, revision, weights=False))


def load_meta(model: str, revision: str | None = None, attn_implementation: str = "sdpa") -> Any:
    """Return the model without weights, on the `meta` device: its modules, widths and config, in a second."""
    source = find(model, revision, weights=False)
    directory = light_directory(source)
    with _told(source), quiet(bars=False), torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        build: Any = AutoModelForCausalLM.from_config
        return build(config, attn_implementation=attn_implementation).eval()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return the sha256 of a fast tokenizer's own JSON."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def accelerator(device: torch.device) -> str:
    """Name what computes: products round alike on equal names."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def capture(lm: LanguageModel, sites: Sequence[SiteSpec], tokens: Tensor) -> dict[str, Tensor]:
    """Run `tokens` (contexts, context_size) as far as the sites need.

    Returns by site name the activations (contexts, context_size, d_in), in the model's dtype and on its
    device. Raises UsageError where the pass ends without having met a site.
    """
    found: dict[str, Tensor] = {}
    wanted = {site.name for site in sites}

    def keep(name: str, value: Tensor) -> None:
        with torch.inference_mode(False):  # a plain tensor, and a copy: what follows may change it in place
            found[name] = value.detach().clone()
        if wanted <= found.keys():
            raise Complete

    with ExitStack() as hooks, torch.inference_mode():
        for site in sites:
            hooks.enter_context(hooked(lm.model, site, tokens.shape, partial(keep, site.name)))
        try:
            lm.model(input_ids=tokens.to(lm.device, torch.long), use_cache=False)
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


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"Device {name!r} cannot be used: {one_line(error)}.") from None
    return device


def _tokenizer(source: Source) -> Any:
    directory = light_directory(source)
    with quiet(bars=False):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # transformers raises many types where files are missing or broken
            raise UsageError(f"Model {source.id!r} has no tokenizer that loads: {one_line(error)}.") from None
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.get_vocab_size() == 0:
        raise UsageError(f"Model {source.id!r} has no tokenizer; a directory with a tokenizer.json is needed.")
    return tokenizer


@contextmanager
def _told(source: Source) -> Iterator[None]:
    """Tell what went wrong with a model in one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise SpaceError(f"Model {source.id!r} does not fit into memory.") from None
    except FileNotFoundError as error:
        raise NotFoundError(f"Model {source.id!r} is not complete: {one_line(error)}.") from None
    except Exception as error:  # transformers raises many types for what it cannot load
        raise UsageError(f"Model {source.id!r} cannot be loaded: {one_line(error)}.") from None
