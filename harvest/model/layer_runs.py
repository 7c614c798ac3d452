"""Experiments on one decoder layer: it runs again on what it was given in a recorded pass, with some values replaced.

A run is one call of the layer over a few tokens; nothing of the model is changed after it.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layer_trace import Call
from .module_values import (
    Change,
    changing_input,
    changing_output,
    first_argument,
    first_tensor,
    skipping,
    with_first_argument,
    with_first_tensor,
)

# Mean square and largest rounding error, in ulps of the largest of the values added.
RMS_ULPS, MOST_ULPS = 2.0, 64.0


@dataclass
class Seen:
    """What a module got and gave in a run, (contexts, tokens, width) or flattened; calls: how often it ran.

    whole: all that it gave, with the first of it in `output`.
    """

    given: Any
    output: Any
    whole: Any
    calls: int = 0
    order: int = 0


class Layer:
    """A decoder layer and its recorded call.

    before, after: the residual stream (contexts, tokens, d_in) that went in and came out. modules: those inside, by
    path. seen: what each of them got and gave, by path, in the order in which they ended.
    """

    def __init__(self, module: nn.Module, call: Call) -> None:
        """Run the layer once as it was, and record its modules."""
        self._module, self._call = module, call
        self.before = call.before
        self.modules = {path: m for path, m in module.named_modules() if path}
        self.seen: dict[str, Seen] = {}
        self.after = self.run(seen=self.seen)

    @property
    def repeatable(self) -> bool:
        """Whether the layer gave what it gave in the pass."""
        return self.close(self.after, self._call.after)

    def run(
        self,
        outputs: Mapping[str, Change | Tensor] | None = None,
        inputs: Mapping[str, Change] | None = None,
        before: Tensor | None = None,
        seen: dict[str, Seen] | None = None,
    ) -> Tensor:
        """Return the stream (contexts, tokens, d_in) that comes out with some values replaced.

        outputs, inputs: what becomes of the first output or input of modules, by path; a module that gets a tensor as
        its output does not run. before: replaces the stream that goes in. seen: filled with what each module gets and
        gives.
        """
        with ExitStack() as hooks, torch.inference_mode():
            for path, change in (inputs or {}).items():
                before_call = changing_input(change)
                hooks.callback(self.modules[path].register_forward_pre_hook(before_call, with_kwargs=True).remove)
            for path, other in (outputs or {}).items():
                if isinstance(other, Tensor):
                    hooks.enter_context(skipping(self.modules[path], self._output_with(path, other)))
                else:
                    hooks.callback(self.modules[path].register_forward_hook(changing_output(other)).remove)
            if seen is not None:
                for path, module in self.modules.items():
                    starting, ending = _watching(path, seen)
                    hooks.callback(module.register_forward_pre_hook(starting, with_kwargs=True).remove)
                    hooks.callback(module.register_forward_hook(ending).remove)
            stream = (self.before if before is None else before).clone()
            args, kwargs = with_first_argument(self._call.args, self._call.kwargs, stream)
            output = self._module(*args, **kwargs)
            return first_tensor(output).clone()  # type: ignore[no-any-return]

    def _output_with(self, path: str, first: Tensor) -> Callable[[], Any]:
        """Return what gives a module's recorded output with another first tensor."""
        # A copy each time, because Falcon adds to its MLP's output in place.
        return lambda: with_first_tensor(self.seen[path].whole, first.clone())

    def output_of(self, path: str, **changes: Any) -> Tensor:
        """Return the first output of a module in a run; changes: arguments of `run`."""
        seen: dict[str, Seen] = {}
        self.run(**changes, seen=seen)
        return seen[path].output  # type: ignore[no-any-return]

    def children(self, path: str) -> list[str]:
        """Return the paths of the direct children of a module; "" for those of the layer."""
        begin, depth = (f"{path}.", path.count(".") + 1) if path else ("", 0)
        return [other for other in self.modules if other.startswith(begin) and other.count(".") == depth]

    def is_stream_shaped(self, value: Any) -> bool:
        """Whether a value has one vector of the stream's width for each token."""
        return (
            isinstance(value, Tensor)
            and value.dim() >= 2
            and value.shape[-1] == self.before.shape[-1]
            and value.numel() == self.before.numel()
        )

    def close(self, found: Tensor, expected: Tensor, *sizes: Tensor) -> bool:
        """Whether two streams are equal to rounding, which is in ulps of them, of `sizes` and of the stream."""
        return self.ulps(found, expected, *sizes) <= 1

    def ulps(self, found: Tensor, expected: Tensor, *sizes: Tensor) -> float:
        """Return the rounding between two values, 1 at what is allowed."""
        a, b = (value.float().reshape(self.before.shape[0] * self.before.shape[1], -1) for value in (found, expected))
        scale = a.abs() + b.abs() + b.square().mean(-1, keepdim=True).sqrt()
        for size in sizes:
            scale = scale + size.float().reshape(scale.shape).abs()
        error = (a - b).abs() / (scale * torch.finfo(found.dtype).eps + 1e-30)
        if not error.isfinite().all():
            return float("inf")
        return max(float(error.square().mean().sqrt()) / RMS_ULPS, float(error.max()) / MOST_ULPS)

    def noise(self, seed: int) -> Tensor:
        """Return random values in the shape of the residual stream, each token's of the size of its stream."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(self.before.shape, generator=generator).to(self.before.device)
        sizes = self.before.float().square().mean(-1, keepdim=True).sqrt()
        return (values * sizes).to(self.before.dtype)


def zero(value: Tensor) -> Tensor:
    """The change that removes a value."""
    return torch.zeros_like(value)


def _watching(path: str, seen: dict[str, Seen]) -> tuple[Callable[..., None], Callable[..., None]]:
    given: list[Any] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(_copied(first_argument(args, kwargs)))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        count = seen[path].calls + 1 if path in seen else 1
        seen[path] = Seen(given.pop(), _copied(first_tensor(output)), output, count, len(seen))

    return before, after


def _copied(value: Any) -> Any:
    """A copy, because later code may change a tensor in place."""
    return value.clone() if isinstance(value, Tensor) else value
