"""The tests that prove the parts of a decoder layer. Each is a run or two of the layer alone over a few tokens.

* Added: a random vector added to the module's output moves the layer's output by a fixed multiple of that vector.
* Complete: with all that is added removed, the layer's output is its input, times a fixed number.
* Separate: with everything else that is added held fixed, a change of the first token changes nothing at others.
* Decides: the value alone decides what a part adds, whatever the residual stream is.
* Linear: a projection is linear but for a bias. Removed: if it gets zeros, its mixer adds one vector to every token.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from .layer_runs import Layer, zero
from .module_values import Change

Side = Literal["in", "out"]


def multiple_of_delta(layer: Layer, path: str, after: Tensor, removed: list[str]) -> float | None:
    """Return the multiple of a vector added to a module's output by which the layer's output moves, None if not.

    after: the layer's output without that vector, with `removed` zero.
    """
    delta = layer.noise(0)

    def change(value: Tensor) -> Tensor:
        return value + delta.reshape(value.shape).to(value.dtype)

    moved = layer.run(outputs={**zeros(layer, removed), path: change})
    wide = delta.float()
    multiple = float(((moved.float() - after.float()) * wide).sum() / wide.square().sum())
    if not 1e-3 < abs(multiple) < 1e3:
        return None
    expected = (after.float() + multiple * wide).to(moved.dtype)
    return multiple if layer.close(moved, expected, after, delta, layer.before) else None


def is_base(layer: Layer, after: Tensor) -> bool:
    """Whether a stream is a fixed multiple of the layer's input, or of a norm of it (RWKV's first layer).

    A vector that is the same at each token, such as a bias that is added beside the parts, is no part.
    """
    first, stream = after[:1, :1], layer.before
    if _is_multiple(layer, after, stream):
        return True
    if _is_multiple(layer, after - first, stream - stream[:1, :1], after, first.expand_as(after), stream):
        return True
    return any(
        layer.is_stream_shaped(one.given)
        and layer.is_stream_shaped(one.output)
        and torch.equal(one.given.reshape(stream.shape), stream)
        and not _has_matrix(layer, path)
        and _is_multiple(layer, after, one.output.reshape(after.shape))
        for path, one in layer.seen.items()
    )


def _is_multiple(layer: Layer, found: Tensor, of: Tensor, *sizes: Tensor) -> bool:
    """Whether a stream is a fixed nonzero multiple of another; sizes: of what was rounded."""
    a, b = found.float(), of.float()
    factor = float((a * b).sum() / b.square().sum())
    return abs(factor) > 1e-3 and layer.close(found, (factor * b).to(found.dtype), *sizes)


def mixes(layer: Layer, path: str, added: list[str]) -> bool:
    """Whether a change of the first token changes what a module gives at others, with the other parts held fixed."""
    held = _held(layer, [other for other in added if other != path])
    changed = layer.output_of(path, outputs=held, before=_with_another_first_token(layer))
    return not layer.close(_but_the_first(layer, changed), _but_the_first(layer, layer.seen[path].output))


def _with_another_first_token(layer: Layer) -> Tensor:
    stream = layer.before.clone()
    stream[:, 0] += layer.noise(1)[:, 0]
    return stream


def _but_the_first(layer: Layer, value: Tensor) -> Tensor:
    """Return a value with zeros at each context's first token."""
    kept = value.reshape(*layer.before.shape[:2], -1).clone()
    kept[:, 0] = 0
    return kept


def decides(layer: Layer, path: str, side: Side, of: str) -> bool:
    """Whether a module's first input or output alone decides the output of another module, or of itself."""
    if side == "out" and path == of:
        return True
    given, other = layer.seen[path].given, layer.before + layer.noise(2)

    def keep(value: Tensor) -> Tensor:
        return given.reshape(value.shape).clone()  # type: ignore[no-any-return]

    inputs: dict[str, Change] = {path: keep} if side == "in" else {}
    outputs = _held(layer, [path]) if side == "out" else {}
    found = layer.output_of(of, before=other, inputs=inputs, outputs=outputs)
    return layer.close(found, layer.seen[of].output)


def is_linear(layer: Layer, path: str) -> bool:
    """Whether a module is linear, but for a bias."""
    once = layer.seen[path].output.float()
    bias = layer.output_of(path, inputs={path: zero}).float()
    twice = layer.output_of(path, inputs={path: lambda value: 2 * value}).float()
    found, expected = ((value - bias).to(layer.before.dtype) for value in (twice, 2 * once - bias))
    return layer.close(found, expected, once, bias)


def is_removed(layer: Layer, projection: str, adds: str, others: list[str]) -> bool:
    """Whether a mixer adds the same vector to each token (its bias, or nothing) if its projection gets zeros."""
    rest = layer.output_of(adds, inputs={projection: zero}, outputs=zeros(layer, others))
    rest = rest.reshape(-1, rest.shape[-1])
    return layer.close(rest, rest[:1].expand_as(rest), layer.seen[adds].output)


def is_only_mixer(layer: Layer, path: str) -> bool:
    """Whether no token changes another one if the output of a linear module is held fixed."""
    after = layer.run(outputs=_held(layer, [path]), before=_with_another_first_token(layer))
    only = layer.close(_but_the_first(layer, after), _but_the_first(layer, layer.after))
    return only and is_linear(layer, path)


def is_entry(layer: Layer, path: str, of: str, ends: tuple[str, ...]) -> bool:
    """Whether a module with weights gets, after the norm, what alone decides what a part adds.

    ends: projections that end the part.
    """
    one = layer.seen[path]
    ends_the_part = path in ends or (path == of and is_matrix(layer, path))
    if ends_the_part or one.calls > 1 or not layer.is_stream_shaped(one.given) or not _has_matrix(layer, path):
        return False
    return not _begins_with_norm(layer, path) and decides(layer, path, "in", of)


def _begins_with_norm(layer: Layer, path: str) -> bool:
    """Whether a norm inside a module gets the module's own input."""
    given = layer.seen[path].given
    return any(
        inner.startswith(f"{path}.")
        and "norm" in type(layer.modules[inner]).__name__.lower()
        and isinstance(one.given, Tensor)
        and one.given.numel() == given.numel()
        and torch.equal(one.given.reshape(given.shape), given)
        for inner, one in layer.seen.items()
    )


def is_between(layer: Layer, path: str, mlp: tuple[str, ...]) -> bool:
    """Whether a module's first input is, times a fixed number, the layer's output without the MLP's part."""
    one = layer.seen[path]
    if one.calls > 1 or not layer.is_stream_shaped(one.given):
        return False
    return _is_multiple(layer, layer.run(outputs=zeros(layer, mlp)), one.given.reshape(layer.before.shape))


def is_matrix(layer: Layer, path: str) -> bool:
    """Whether a module is one product with a matrix: it has weights, no modules inside, and ran once."""
    one, module = layer.seen[path], layer.modules[path]
    return (
        one.calls == 1
        and not any(True for _ in module.children())
        and _has_matrix(layer, path)
        and layer.is_stream_shaped(one.output)
        and isinstance(one.given, Tensor)
        and one.given.shape[:-1] == one.output.shape[:-1]
    )


def _has_matrix(layer: Layer, path: str) -> bool:
    """Whether a module has a weight that is no vector; those of quantised modules are buffers in some libraries."""
    module = layer.modules[path]
    return any(w.dim() >= 2 for weights in (module.parameters(), module.buffers()) for w in weights)


def zeros(layer: Layer, paths: Iterable[str]) -> dict[str, Tensor]:
    """Return outputs of zeros for modules, which do not run then."""
    return {path: torch.zeros_like(layer.seen[path].output) for path in paths}


def _held(layer: Layer, paths: Iterable[str]) -> dict[str, Tensor]:
    return {path: layer.seen[path].output for path in paths}


def equal(layer: Layer, path: str, other: str) -> bool:
    """Whether two modules gave the same value."""
    a, b = layer.seen[path].output, layer.seen[other].output
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))
