"""Where a model's residual stream runs: one pass over a few tokens records every call of every list of layers.

The decoder is the list of layers in which the output of each layer is, bit for bit, the input of the next one. This
needs no list of model families, and holds for any mixer. The pass also shows whether a token sees later ones.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gsae.errors import GsaeError, UsageError

from .module_values import first_argument, first_tensor
from .pass_errors import pass_errors

CONTEXTS, TOKENS = 2, 16


@dataclass(frozen=True)
class Call:
    """One call of a layer: its arguments, and the streams (contexts, tokens, d_in) that went in and came out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Decoder:
    """The decoder layers of a model, their path in it, and the call of each in one pass by its number.

    Layers that text does not reach have no call: those of Mllama that attend to images.
    """

    path: str
    layers: tuple[nn.Module, ...]
    calls: Mapping[int, Call]

    @property
    def first(self) -> int:
        """The number of the first layer that runs."""
        return min(self.calls)

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.calls[self.first].before.shape[-1]


def trace_decoder(model: Any) -> Decoder:
    """Run a model over a few tokens and return its decoder.

    Raises UsageError if the pass fails, if no list of layers or more than one carries one residual stream, or if
    tokens see later ones.
    """
    lists = {path: list(m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    with torch.inference_mode(), _recording(lists) as calls:
        _run(model)
    called = {
        path: {number: calls[layer] for number, layer in enumerate(layers) if layer in calls}
        for path, layers in lists.items()
    }
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    faults = {path: _fault(path, each, width) for path, each in called.items() if each}
    found = [path for path, fault in faults.items() if not fault]
    outermost = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if not outermost:
        raise UsageError(f"no residual stream was found in {type(model).__name__}{_why(faults)}. {BY_PATH}")
    if len(outermost) > 1:
        raise UsageError(f"{type(model).__name__} has several residual streams ({', '.join(outermost)}). {BY_PATH}")
    (path,) = outermost
    decoder = Decoder(path, tuple(lists[path]), {number: each[0] for number, each in called[path].items()})
    _check_causal(decoder, type(model).__name__)
    return decoder


BY_PATH = "Name a module, as module:PATH:in or module:PATH:out."


def probe_tokens(model: Any) -> Tensor:
    """Return token ids (CONTEXTS, TOKENS): both contexts are equal but for the last token."""
    configs = (model.config, model.config.get_text_config())
    special = {str(v) for c in configs for name, v in vars(c).items() if "_token_i" in name}  # ids and indices
    embedding = model.get_input_embeddings()
    known = int(getattr(embedding, "num_embeddings", 0) or configs[1].vocab_size)
    plain = [number for number in range(min(known, 4 * TOKENS)) if str(number) not in special]
    row = [plain[(7 * i + 3) % len(plain)] for i in range(TOKENS + 1)]
    return torch.tensor([row[:TOKENS], [*row[: TOKENS - 1], row[TOKENS]]])


def input_device(model: Any) -> torch.device:
    """Return the device that takes the tokens."""
    embedding = model.get_input_embeddings()
    # Weights that a device map keeps elsewhere are on `meta` until accelerate's hook moves them to where they run.
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if device is None:
        device = "cpu" if embedding.weight.is_meta else embedding.weight.device
    return torch.device(device)


@contextmanager
def _recording(lists: Mapping[str, list[nn.Module]]) -> Iterator[dict[nn.Module, list[Call]]]:
    """Record the calls of the elements of `lists` meanwhile."""
    calls: dict[nn.Module, list[Call]] = {}
    given: dict[nn.Module, Any] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        stream = first_argument(args, kwargs)
        # A copy, because a layer may add to its input in place.
        given[module] = stream.clone() if isinstance(stream, Tensor) else stream

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        stream = first_tensor(output)
        copied = stream.clone() if isinstance(stream, Tensor) else stream
        calls.setdefault(module, []).append(Call(args, kwargs, given.pop(module, None), copied))

    with ExitStack() as hooks:
        for module in {id(m): m for layers in lists.values() for m in layers}.values():
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield calls


def _run(model: Any) -> None:
    tokens = probe_tokens(model).to(input_device(model))
    with pass_errors(model, tokens.shape, GsaeError):
        model(input_ids=tokens, use_cache=False)


def _fault(path: str, calls: Mapping[int, list[Call]], width: int | None) -> str:
    """Return what keeps a list of layers from being a decoder, "" if it is one.

    width: of the config; a stream of another width may be several side by side (Qwen4-Exp).
    """
    for number, each in calls.items():
        if len(each) != 1:
            return f"{path}.{number} runs {len(each)} times in a pass"
        for side, stream in (("input", each[0].before), ("output", each[0].after)):
            shape = tuple(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
            if not isinstance(stream, Tensor) or shape != (CONTEXTS, TOKENS, width or stream.shape[-1]):
                needed = f"({CONTEXTS}, {TOKENS}, {width or 'd_in'})"
                return f"the {side} of {path}.{number} is {shape}; {needed} is needed"
    for this, following in itertools.pairwise(calls):
        after = calls[this][0].after
        if not _same(after, calls[following][0].before.to(after.device)):
            return f"the output of {path}.{this} is not the input of {path}.{following}"
    return ""


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two streams are equal; a NaN equals a NaN, because a model that overflows is still a chain of layers."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _why(faults: Mapping[str, str]) -> str:
    outermost = [path for path in faults if not any(path.startswith(f"{other}.") for other in faults)]
    return "".join(f": {faults[path]}" for path in outermost[:1])


def _check_causal(decoder: Decoder, name: str) -> None:
    """Raise UsageError if the last token of a context changes what comes before it."""
    for number, call in decoder.calls.items():
        one, other = call.after[:, :-1].float()
        finite = one.isfinite().all(-1) | other.isfinite().all(-1)  # nothing can be said where both overflow
        if not finite.any():
            continue
        one, other = one[finite], other[finite]
        size = one.abs() + other.abs() + one.square().mean(-1, keepdim=True).sqrt()
        ulps = (one - other).abs() / (size * torch.finfo(call.after.dtype).eps + 1e-30)
        # Of most tokens: rounding may send one token to another expert.
        if not ulps.square().mean(-1).sqrt().median() <= 4 * (number + 1):
            raise UsageError(
                f"in {name}, tokens see later tokens (layer {number}), as in an encoder, so no row would be "
                "what a language model has after a text's beginning."
            )
