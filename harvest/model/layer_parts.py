"""The parts of a decoder layer: what its MLP and its mixers add to the residual stream, and the tests that prove it.

A part is a module that passes tests; its name decides nothing. Each test is a run of the layer alone over a few tokens.

* Added: a random vector added to the module's output moves the layer's output by a fixed multiple of that vector.
* Complete: with all that is added removed, the layer's output is its input, times a fixed number.
* Separate: with everything else that is added held fixed, a change of the first token changes nothing at others.
* Decides: the value alone decides what a part adds, whatever the residual stream is.
* Linear: a projection is linear but for a bias. Removed: if it gets zeros, its mixer adds one vector to every token.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from .layer_runs import Change, Layer, Seen, zero

Side = Literal["in", "out"]
Point = tuple[str, Side]
"""A module of a layer by its path, and its first input or its output."""

STAGES = 4
NO_MLP = "everything that the layer adds mixes tokens"
NO_MIXER = "nothing that the layer adds mixes tokens"


@dataclass(frozen=True)
class Mixer:
    """What moves information between tokens: the module that adds to the stream, and the projection that ends it."""

    adds: str
    projection: str


@dataclass(frozen=True)
class Parts:
    """The parts of one layer, by module path in it, and why others were not found.

    mlp: the modules that together are the MLP's part. mixers: in the order in which they run. post_norm: the layer
    normalises the stream after each addition, so nothing is added to it unchanged. mlp_in, mixer_in: what enters the
    MLP and the one mixer. middle: the residual stream between them. missing: why there is no MLP or mixer, by "mlp"
    and "mixer".
    """

    mlp: tuple[str, ...] = ()
    mixers: tuple[Mixer, ...] = ()
    post_norm: bool = False
    mlp_in: Point | None = None
    mixer_in: Point | None = None
    middle: Point | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


def find_parts(layer: Layer) -> Parts:
    """Find the parts of a layer by the tests."""
    if not layer.repeatable:
        return Parts(missing=dict.fromkeys(("mlp", "mixer"), "a second run of the layer gives another output"))
    stages, complete = _stages(layer)
    added = [path for stage in stages for path in stage]
    if not complete:
        removed = f"{' and '.join(added)} removed" if added else "nothing found that is added to it"
        return _post_norm(layer, f"with {removed}, the layer's output is not its input")
    mixing = [path for path in added if _mixes(layer, path, added)]
    mlp = tuple(path for path in added if path not in mixing)
    missing: dict[str, str] = {}
    if not mlp:
        missing["mlp"] = NO_MLP
    elif any(path not in stages[0] for path in mlp):
        order = " after ".join("(" + " and ".join(stage) + ")" for stage in stages)
        missing["mlp"], mlp = f"the MLP's part is not what is added last: {order}", ()
    if len(stages) == 2 and mixing == added:  # RWKV: its MLP sees the token before, too
        mixing = stages[1]
    mixers, why = _mixers(layer, mixing, added)
    if why:
        missing["mixer"] = why
    parts = Parts(mlp, mixers, missing=missing)
    return replace(
        parts,
        mlp_in=_entry(layer, mlp[0], ()) if len(mlp) == 1 else None,
        mixer_in=_entry(layer, mixers[0].adds, (mixers[0].projection,)) if len(mixers) == 1 else None,
        middle=_middle(layer, mlp) if len(stages) == 2 and mlp and mixers else None,
    )


def failed_test(layer: Layer, kind: str, parts: Parts) -> str:
    """Repeat the tests of a kind of site on a layer with known parts; return what fails, "" if nothing does."""
    if not layer.repeatable:
        return "a second run of the layer gives another output"
    for path in _paths(parts):
        if path not in layer.seen:
            return f"{path} does not run"
    if kind == "mlp":
        return _failed_mlp(layer, parts)
    if kind == "resid_mid":
        between = parts.middle is not None and _is_between(layer, parts.middle[0], parts.mlp)
        return "" if between else "it is not the residual stream between mixer and MLP"
    if kind in ("mlp_in", "attn_in"):
        point, of = (parts.mlp_in, parts.mlp[0]) if kind == "mlp_in" else (parts.mixer_in, parts.mixers[0].adds)
        ends = tuple(mixer.projection for mixer in parts.mixers) if kind == "attn_in" else ()
        entry = point is not None and _is_entry(layer, point[0], of, ends)
        return "" if entry else f"it alone does not decide what {of} adds, or comes before the norm"
    return next((why for mixer in parts.mixers if (why := _failed_mixer(layer, mixer, parts))), "")


def _paths(parts: Parts) -> list[str]:
    points = [point[0] for point in (parts.mlp_in, parts.mixer_in, parts.middle) if point is not None]
    return [*parts.mlp, *(path for mixer in parts.mixers for path in (mixer.adds, mixer.projection)), *points]


def _failed_mlp(layer: Layer, parts: Parts) -> str:
    added = [*parts.mlp, *(mixer.adds for mixer in parts.mixers)]
    for path in parts.mlp:
        if not layer.is_stream_shaped(layer.seen[path].output):
            return f"{path} does not give one vector of the stream's width for each token"
        if _multiple_of_delta(layer, path, layer.after, []) is None:
            return f"a vector added to the output of {path} does not come out of the layer"
        if _mixes(layer, path, added):
            return f"{path} mixes tokens"
    if not _is_base(layer, layer.run(outputs=_zeros(layer, added))):
        return f"with {' and '.join(added)} removed, the layer's output is not its input"
    return ""


def _failed_mixer(layer: Layer, mixer: Mixer, parts: Parts) -> str:
    path, adds = mixer.projection, mixer.adds
    others = [*parts.mlp, *(other.adds for other in parts.mixers if other != mixer)]
    if parts.post_norm:
        return "" if _is_only_mixer(layer, path) else f"tokens are mixed beside {path}"
    if not decides(layer, (path, "out"), adds):
        return f"the output of {path} alone does not decide what {adds} adds"
    return "" if _is_linear(layer, path) and _is_removed(layer, path, adds, others) else f"{path} is not linear"


def _stages(layer: Layer) -> tuple[list[list[str]], bool]:
    """Return the modules that add to the stream, the last ones first, and whether they are all there is."""
    stages: list[list[str]] = []
    while len(stages) < STAGES:
        removed = [path for stage in stages for path in stage]
        found = _additions(layer, removed)
        if not found:
            return stages, False
        stages.append(found)
        if _is_base(layer, layer.run(outputs=_zeros(layer, [*removed, *found]))):
            return stages, True
    return stages, False


def _additions(layer: Layer, removed: list[str]) -> list[str]:
    """Return the outermost modules with outputs that are added to the stream when `removed` are zero."""
    seen: dict[str, Seen] = {}
    after = layer.run(outputs=_zeros(layer, removed), seen=seen)
    found: list[str] = []

    def search(path: str) -> None:
        for child in sorted(layer.children(path), key=lambda child: seen[child].order if child in seen else -1):
            one = seen.get(child)
            if child in removed:
                continue
            if one is None or not layer.is_stream_shaped(one.output):
                search(child)  # a container, or a module that gives something else
            elif one.calls > 1 or any(_equal(layer, child, other) for other in [*removed, *found]):
                continue  # such as the dropout of a part that is already found
            elif torch.equal(one.output.reshape(after.shape), after):
                search(child)  # the stream itself
            elif _multiple_of_delta(layer, child, after, removed) is not None:
                found.append(child)

    search("")
    return found


def _multiple_of_delta(layer: Layer, path: str, after: Tensor, removed: list[str]) -> float | None:
    """Return the multiple of a vector added to a module's output by which the layer's output moves, None if not.

    after: the layer's output without that vector, with `removed` zero.
    """
    delta = layer.noise(layer.before)

    def change(value: Tensor) -> Tensor:
        return value + delta.reshape(value.shape).to(value.dtype)

    moved = layer.run(outputs={**_zeros(layer, removed), path: change})
    wide = delta.float()
    multiple = float(((moved.float() - after.float()) * wide).sum() / wide.square().sum())
    if not 1e-3 < abs(multiple) < 1e3:
        return None
    expected = (after.float() + multiple * wide).to(moved.dtype)
    return multiple if layer.close(moved, expected, after, delta, layer.before) else None


def _is_base(layer: Layer, after: Tensor) -> bool:
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


def _mixes(layer: Layer, path: str, added: list[str]) -> bool:
    """Whether a change of the first token changes what a module gives at others, with the other parts held fixed."""
    held = _held(layer, [other for other in added if other != path])
    changed = layer.output_of(path, outputs=held, before=_with_another_first_token(layer))
    return not layer.close(_but_the_first(layer, changed), _but_the_first(layer, layer.seen[path].output))


def _with_another_first_token(layer: Layer) -> Tensor:
    stream = layer.before.clone()
    stream[:, 0] += layer.noise(layer.before, 1)[:, 0]
    return stream


def _but_the_first(layer: Layer, value: Tensor) -> Tensor:
    """Return a value with zeros at each context's first token."""
    kept = value.reshape(*layer.before.shape[:2], -1).clone()
    kept[:, 0] = 0
    return kept


def _mixers(layer: Layer, mixing: list[str], added: list[str]) -> tuple[tuple[Mixer, ...], str]:
    """Return the mixers with their projections, and what is missing."""
    if not mixing:
        return (), NO_MIXER
    mixers = []
    for path in mixing:
        projection = _projection(layer, path, [other for other in added if other != path])
        if projection is None:
            return (), f"no linear projection alone decides what {path} adds"
        mixers.append(Mixer(path, projection))
    return tuple(mixers), ""


def _projection(layer: Layer, adds: str, others: list[str]) -> str | None:
    """Return the projection that ends a mixer: the last linear module that alone decides what is added."""
    last = layer.seen[adds].order
    candidates = [path for path, one in layer.seen.items() if one.order <= last and _is_matrix(layer, path)]
    for path in sorted(candidates, key=lambda path: -layer.seen[path].order):
        if decides(layer, (path, "out"), adds) and _is_linear(layer, path) and _is_removed(layer, path, adds, others):
            return path
    return None


def decides(layer: Layer, point: Point, of: str) -> bool:
    """Whether a module's first input or output alone decides the output of another module, or of itself."""
    path, side = point
    if side == "out" and path == of:
        return True
    given, other = layer.seen[path].given, layer.before + layer.noise(layer.before, 2)

    def keep(value: Tensor) -> Tensor:
        return given.reshape(value.shape).clone()  # type: ignore[no-any-return]

    inputs: dict[str, Change] = {path: keep} if side == "in" else {}
    outputs = _held(layer, [path]) if side == "out" else {}
    found = layer.output_of(of, before=other, inputs=inputs, outputs=outputs)
    return layer.close(found, layer.seen[of].output)


def _is_linear(layer: Layer, path: str) -> bool:
    """Whether a module is linear, but for a bias."""
    once = layer.seen[path].output.float()
    bias = layer.output_of(path, inputs={path: zero}).float()
    twice = layer.output_of(path, inputs={path: lambda value: 2 * value}).float()
    found, expected = ((value - bias).to(layer.before.dtype) for value in (twice, 2 * once - bias))
    return layer.close(found, expected, once, bias)


def _is_removed(layer: Layer, projection: str, adds: str, others: list[str]) -> bool:
    """Whether a mixer adds the same vector to each token (its bias, or nothing) if its projection gets zeros."""
    rest = layer.output_of(adds, inputs={projection: zero}, outputs=_zeros(layer, others))
    rest = rest.reshape(-1, rest.shape[-1])
    return layer.close(rest, rest[:1].expand_as(rest), layer.seen[adds].output)


def _post_norm(layer: Layer, why: str) -> Parts:
    """Return the mixer of a layer that changes the stream after additions, if one projection is the only way to mix."""
    candidates = [path for path in layer.seen if _is_matrix(layer, path)]
    for path in sorted(candidates, key=lambda path: -layer.seen[path].order):
        if _is_only_mixer(layer, path) and _mixes(layer, path, []):
            return Parts(mixers=(Mixer(path, path),), post_norm=True, missing={"mlp": why})
    return Parts(missing={"mlp": why, "mixer": why})


def _is_only_mixer(layer: Layer, path: str) -> bool:
    """Whether no token changes another one if the output of a linear module is held fixed."""
    after = layer.run(outputs=_held(layer, [path]), before=_with_another_first_token(layer))
    only = layer.close(_but_the_first(layer, after), _but_the_first(layer, layer.after))
    return only and _is_linear(layer, path)


def _entry(layer: Layer, of: str, ends: tuple[str, ...]) -> Point | None:
    """Return the input that alone decides what a part adds, after the norm: that of its outermost module."""
    last = layer.seen[of].order
    before = sorted((path for path, one in layer.seen.items() if one.order <= last), key=lambda path: path.count("."))
    return next(((path, "in") for path in before if _is_entry(layer, path, of, ends)), None)


def _is_entry(layer: Layer, path: str, of: str, ends: tuple[str, ...]) -> bool:
    """Whether a module with weights gets, after the norm, what alone decides what a part adds.

    ends: projections that end the part.
    """
    one = layer.seen[path]
    ends_the_part = path in ends or (path == of and _is_matrix(layer, path))
    if ends_the_part or one.calls > 1 or not layer.is_stream_shaped(one.given) or not _has_matrix(layer, path):
        return False
    return not _begins_with_norm(layer, path) and decides(layer, (path, "in"), of)


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


def _middle(layer: Layer, mlp: tuple[str, ...]) -> Point | None:
    """Return the input of a module that is the stream between the mixing and the MLP."""
    for path in sorted(layer.seen, key=lambda path: (path.count("."), layer.seen[path].order)):
        if _is_between(layer, path, mlp):
            return path, "in"
    return None


def _is_between(layer: Layer, path: str, mlp: tuple[str, ...]) -> bool:
    """Whether a module's first input is, times a fixed number, the layer's output without the MLP's part."""
    one = layer.seen[path]
    if one.calls > 1 or not layer.is_stream_shaped(one.given):
        return False
    return _is_multiple(layer, layer.run(outputs=_zeros(layer, mlp)), one.given.reshape(layer.before.shape))


def _is_matrix(layer: Layer, path: str) -> bool:
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


def _zeros(layer: Layer, paths: Iterable[str]) -> dict[str, Tensor]:
    return {path: torch.zeros_like(layer.seen[path].output) for path in paths}


def _held(layer: Layer, paths: Iterable[str]) -> dict[str, Tensor]:
    return {path: layer.seen[path].output for path in paths}


def _equal(layer: Layer, path: str, other: str) -> bool:
    """Whether two modules gave the same value."""
    a, b = layer.seen[path].output, layer.seen[other].output
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))
