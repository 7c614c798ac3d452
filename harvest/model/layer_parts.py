"""The parts of a decoder layer: what its MLP and its mixers add to the residual stream.

A part is a module that passes the tests of `layer_proofs.py`; its name decides nothing. Finding the parts of a layer
costs some dozens of runs of it over a few tokens, testing known parts fewer than ten.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from .layer_proofs import (
    decides,
    equal,
    is_base,
    is_between,
    is_entry,
    is_linear,
    is_matrix,
    is_only_mixer,
    is_removed,
    mixes,
    multiple_of_delta,
    zeros,
)
from .layer_runs import Layer, Seen

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
    normalises the stream after each addition, so nothing is added to it unchanged. mlp_in, mixer_in: the modules with
    the first input that enters the MLP and the one mixer. middle: the module with the first input that is the residual
    stream between them. missing: why there is no MLP or mixer, by "mlp"
    and "mixer".
    """

    mlp: tuple[str, ...] = ()
    mixers: tuple[Mixer, ...] = ()
    post_norm: bool = False
    mlp_in: str | None = None
    mixer_in: str | None = None
    middle: str | None = None
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
    mixing = [path for path in added if mixes(layer, path, added)]
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
        between = parts.middle is not None and is_between(layer, parts.middle, parts.mlp)
        return "" if between else "it is not the residual stream between mixer and MLP"
    if kind in ("mlp_in", "attn_in"):
        entry, of = (parts.mlp_in, parts.mlp[0]) if kind == "mlp_in" else (parts.mixer_in, parts.mixers[0].adds)
        ends = tuple(mixer.projection for mixer in parts.mixers) if kind == "attn_in" else ()
        proven = entry is not None and is_entry(layer, entry, of, ends)
        return "" if proven else f"it alone does not decide what {of} adds, or comes before the norm"
    return next((why for mixer in parts.mixers if (why := _failed_mixer(layer, mixer, parts))), "")


def _paths(parts: Parts) -> list[str]:
    points = [path for path in (parts.mlp_in, parts.mixer_in, parts.middle) if path is not None]
    return [*parts.mlp, *(path for mixer in parts.mixers for path in (mixer.adds, mixer.projection)), *points]


def _failed_mlp(layer: Layer, parts: Parts) -> str:
    added = [*parts.mlp, *(mixer.adds for mixer in parts.mixers)]
    for path in parts.mlp:
        if not layer.is_stream_shaped(layer.seen[path].output):
            return f"{path} does not give one vector of the stream's width for each token"
        if multiple_of_delta(layer, path, layer.after, []) is None:
            return f"a vector added to the output of {path} does not come out of the layer"
        if mixes(layer, path, added):
            return f"{path} mixes tokens"
    if not is_base(layer, layer.run(outputs=zeros(layer, added))):
        return f"with {' and '.join(added)} removed, the layer's output is not its input"
    return ""


def _failed_mixer(layer: Layer, mixer: Mixer, parts: Parts) -> str:
    path, adds = mixer.projection, mixer.adds
    others = [*parts.mlp, *(other.adds for other in parts.mixers if other != mixer)]
    if parts.post_norm:
        return "" if is_only_mixer(layer, path) else f"tokens are mixed beside {path}"
    if not decides(layer, path, "out", adds):
        return f"the output of {path} alone does not decide what {adds} adds"
    return "" if is_linear(layer, path) and is_removed(layer, path, adds, others) else f"{path} is not linear"


def _stages(layer: Layer) -> tuple[list[list[str]], bool]:
    """Return the modules that add to the stream, the last ones first, and whether they are all there is."""
    stages: list[list[str]] = []
    while len(stages) < STAGES:
        removed = [path for stage in stages for path in stage]
        found = _additions(layer, removed)
        if not found:
            return stages, False
        stages.append(found)
        if is_base(layer, layer.run(outputs=zeros(layer, [*removed, *found]))):
            return stages, True
    return stages, False


def _additions(layer: Layer, removed: list[str]) -> list[str]:
    """Return the outermost modules with outputs that are added to the stream when `removed` are zero."""
    seen: dict[str, Seen] = {}
    after = layer.run(outputs=zeros(layer, removed), seen=seen)
    found: list[str] = []

    def search(path: str) -> None:
        for child in sorted(layer.children(path), key=lambda child: seen[child].order if child in seen else -1):
            one = seen.get(child)
            if child in removed:
                continue
            if one is None or not layer.is_stream_shaped(one.output):
                search(child)  # a container, or a module that gives something else
            elif one.calls > 1 or any(equal(layer, child, other) for other in [*removed, *found]):
                continue  # such as the dropout of a part that is already found
            elif torch.equal(one.output.reshape(after.shape), after):
                search(child)  # the stream itself
            elif multiple_of_delta(layer, child, after, removed) is not None:
                found.append(child)

    search("")
    return found


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
    candidates = [path for path, one in layer.seen.items() if one.order <= last and is_matrix(layer, path)]
    for path in sorted(candidates, key=lambda path: -layer.seen[path].order):
        if decides(layer, path, "out", adds) and is_linear(layer, path) and is_removed(layer, path, adds, others):
            return path
    return None


def _post_norm(layer: Layer, why: str) -> Parts:
    """Return the mixer of a layer that changes the stream after additions, if one projection is the only way to mix."""
    candidates = [path for path in layer.seen if is_matrix(layer, path)]
    for path in sorted(candidates, key=lambda path: -layer.seen[path].order):
        if is_only_mixer(layer, path) and mixes(layer, path, []):
            return Parts(mixers=(Mixer(path, path),), post_norm=True, missing={"mlp": why})
    return Parts(missing={"mlp": why, "mixer": why})


def _entry(layer: Layer, of: str, ends: tuple[str, ...]) -> str | None:
    """Return the outermost module with the input that alone decides what a part adds, after the norm."""
    last = layer.seen[of].order
    before = sorted((path for path, one in layer.seen.items() if one.order <= last), key=lambda path: path.count("."))
    return next((path for path in before if is_entry(layer, path, of, ends)), None)


def _middle(layer: Layer, mlp: tuple[str, ...]) -> str | None:
    """Return the outermost module with the input that is the stream between the mixing and the MLP."""
    outermost = sorted(layer.seen, key=lambda path: (path.count("."), layer.seen[path].order))
    return next((path for path in outermost if is_between(layer, path, mlp)), None)
