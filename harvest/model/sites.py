"""From site names to modules of the model. A site is offered only if experiments on the model confirm it.

What the decoder, the MLP and the mixers of a layer are is found by `structure.py`, from numbers, so no list of model
families is needed and a wrong guess cannot be stored. Any other module is named by its path. Names cost nothing; the
structure costs a pass over a few tokens, and some dozens of runs of a layer for each kind of layer.
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gsae.errors import UsageError
from gsae.store import SiteSpec

from .capture import SUM
from .layer_parts import NO_MIXER, NO_MLP, Parts
from .module_values import first_argument
from .structure import Structure, is_attention, structure_of

Kind = Literal["resid", "mlp", "attn", "mixer", "resid_mid", "mlp_in", "attn_in"]
Side = Literal["in", "out"]
KINDS = "resid.L, mlp.L, attn.L, mixer.L, resid_mid.L, mlp_in.L, attn_in.L, embed or module:PATH:in|out"
HOOK_NAMES: dict[Kind, str] = {
    "resid": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "attn": "attn.hook_z",
    "mixer": "mixer.hook_z",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "ln2.hook_normalized",
    "attn_in": "ln1.hook_normalized",
}
EMBED = "embed"
NAME = re.compile(rf"({'|'.join(HOOK_NAMES)})\.(?:(all)|(-?[0-9]+)(?:-(-?[0-9]+))?)")


@dataclass(frozen=True)
class Place:
    """Where a site is in its layer: the modules with outputs that it is the sum of, or one module's input."""

    paths: tuple[str, ...]
    side: Side
    width: int


@dataclass(frozen=True)
class Survey:
    """The sites that a model offers, what the mixer of each `attn.L` and `mixer.L` is, and why others are missing."""

    sites: tuple[SiteSpec, ...]
    mixers: dict[str, str]
    missing: dict[str, str]


def split_names(text: str) -> list[str]:
    """Split a list such as `mlp.0,4,8-10,attn.3`, in which a number alone is another layer of the kind before it."""
    names: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if re.fullmatch(r"-?[0-9]+(-{1,2}[0-9]+)?", part) and names and NAME.fullmatch(names[-1]):
            part = f"{names[-1].split('.')[0]}.{part}"
        names.append(part)
    return names


def resolve(model: Any, names: Iterable[str]) -> tuple[SiteSpec, ...]:
    """Return the sites of a transformers model that `names` stand for, in their order; see `resolve_with_parts`."""
    return resolve_with_parts(model, names)[0]


def resolve_with_parts(model: Any, names: Iterable[str]) -> tuple[tuple[SiteSpec, ...], dict[int, Parts]]:
    """Return the sites of a transformers model that `names` stand for, and the parts of the layers that have them.

    `resid.L` is the output of decoder layer L. `mlp.L` is what its MLP branch adds to the residual stream. `mixer.L` is
    the input of the projection that ends what moves information between tokens, and `attn.L` is the same where that
    is an attention: the concatenated output of the heads. `resid_mid.L` is the stream between mixer and MLP, `mlp_in.L`
    and `attn_in.L` are what enters the MLP and the mixer, after the norm, and `embed` is what enters layer 0. L counts
    from 0, or back from -1 for the last layer; it may be a range (`resid.10-14`) or `all`, the layers that have such a
    site. `module:PATH:in` and `module:PATH:out` are the first input and the output of any module. Raises UsageError for
    a name of another form, a site that this model does not have or that is not confirmed, and a site named twice.
    """
    structure = cache(lambda: structure_of(model))
    sites = tuple(site for name in names for site in _sites(model, name, structure))
    found: set[str] = set()
    for site in sites:
        if site.name in found:
            raise UsageError(f"Site {site.name!r} is named twice.")
        found.add(site.name)
    layers = sorted({int(site.name.split(".")[1]) for site in sites if _needs_parts(site.name)})
    return sites, {number: structure().parts(number) for number in layers}


def survey(model: Any) -> Survey:
    """Return the sites of all layers of a transformers model; raises UsageError if it has no decoder layers."""
    structure = structure_of(model)
    sites, mixers, missing = list[SiteSpec](), dict[str, str](), dict[str, str]()
    for kind in HOOK_NAMES:
        for number in range(structure.layers):
            name = f"{kind}.{number}"
            try:
                sites.append(_site(structure, kind, number))
            except UsageError as error:
                missing[name] = str(error)
                continue
            if kind in ("attn", "mixer"):
                mixers[name] = structure.mixer_kind(number, _place(structure, kind, number).paths[0])
    if mixers and all(is_attention(kind) for kind in mixers.values()):  # `mixer.L` is `attn.L` then
        sites = [site for site in sites if not site.name.startswith("mixer.")]
        mixers = {name: kind for name, kind in mixers.items() if not name.startswith("mixer.")}
        missing = {name: why for name, why in missing.items() if not name.startswith("mixer.")}
    return Survey((*sites, _embed(structure)), mixers, missing)


def offered(model: Any) -> Iterator[SiteSpec]:
    """Yield the sites of all layers of a transformers model; raises UsageError if it has no decoder layers."""
    yield from survey(model).sites


class _HasNoneError(UsageError):
    """A layer has no part of the kind of a site; not that one was found and not confirmed."""


def _needs_parts(name: str) -> bool:
    parts = NAME.fullmatch(name)
    return parts is not None and parts[1] != "resid"


def _sites(model: Any, name: str, find: Callable[[], Structure]) -> Iterator[SiteSpec]:
    """Yield the sites that a name stands for."""
    if name.startswith("module:"):
        yield _module_site(model, name)
        return
    parts = NAME.fullmatch(name)
    if parts is None and name != EMBED:
        raise UsageError(f"{name!r} is not a site. A site is {KINDS}, for instance mlp.10.{_nearest(model, name)}")
    try:
        structure = find()
    except UsageError as error:
        raise UsageError(f"Site {name!r}: {error}") from None
    if parts is None:
        yield _embed(structure)
        return
    kind: Kind = parts[1]  # type: ignore[assignment]
    count = structure.layers
    first, last = (0, count - 1) if parts[2] else (int(parts[3]), int(parts[4] or parts[3]))
    first, last = (layer + (count if layer < 0 else 0) for layer in (first, last))
    if not 0 <= first <= last < count:
        raise UsageError(f"Site {name!r}: this model has layers 0 to {count - 1}.")
    found, why = [], ""
    for layer in range(first, last + 1):
        try:
            found.append(_site(structure, kind, layer))
        except UsageError as error:
            why = f"Site {name!r}: in layer {layer}, {error}"
            if not parts[2] or not isinstance(error, _HasNoneError):
                raise UsageError(why) from None
    if not found:
        raise UsageError(why)
    yield from found


def _embed(structure: Structure) -> SiteSpec:
    return SiteSpec(
        name=EMBED,
        folder=EMBED,
        module=f"{structure.path}.{structure.first}",
        hook="in",
        hook_name=f"blocks.{structure.first}.hook_resid_pre",
        d_in=structure.d_model,
    )


def _site(structure: Structure, kind: Kind, number: int) -> SiteSpec:
    """Return a site of a layer; raises UsageError with what was found if it is not confirmed."""
    place = _place(structure, kind, number)
    layer = f"{structure.path}.{number}"
    return SiteSpec(
        name=f"{kind}.{number}",
        folder=f"{kind}.{number}",
        module=SUM.join(f"{layer}.{path}" if path else layer for path in place.paths),
        hook=place.side,
        hook_name=f"blocks.{number}.{HOOK_NAMES[kind]}",
        d_in=place.width,
    )


def _place(structure: Structure, kind: Kind, number: int) -> Place:
    """Return where a site is in its layer; raises UsageError with what was found if it is not confirmed."""
    if not structure.runs(number):
        raise _HasNoneError("nothing runs on text.")
    if kind == "resid":
        return Place(("",), "out", structure.d_model)
    parts = structure.parts(number)
    if kind == "mlp":
        if not parts.mlp:
            raise _missing(parts, "mlp")
        return Place(parts.mlp, "out", structure.d_model)
    if kind in ("attn", "mixer"):
        path = _projection(structure, kind, number, parts)
        return Place((path,), "in", structure.width(number, path))
    entry = {"resid_mid": parts.middle, "mlp_in": parts.mlp_in, "attn_in": parts.mixer_in}[kind]
    if entry is None:
        raise _HasNoneError(f"{MISSING_INPUTS[kind]}.")
    if kind == "attn_in" and not is_attention(structure.mixer_kind(number, parts.mixers[0].projection)):
        raise _HasNoneError("the mixer is no attention.")
    return Place((entry,), "in", structure.width(number, entry))


def _missing(parts: Parts, kind: str) -> UsageError:
    why = parts.missing[kind]
    return (_HasNoneError if why in (NO_MLP, NO_MIXER) else UsageError)(f"{why}.")


MISSING_INPUTS = {
    "resid_mid": "no module gets the residual stream between a mixer and an MLP",
    "mlp_in": "no module has an input that alone decides what the MLP adds",
    "attn_in": "no module has an input that alone decides what one attention adds",
}


def _projection(structure: Structure, kind: Kind, number: int, parts: Parts) -> str:
    """Return the projection of a layer's one mixer, or of its one attention."""
    kinds = {mixer.projection: structure.mixer_kind(number, mixer.projection) for mixer in parts.mixers}
    if not kinds:
        raise _missing(parts, "mixer")
    wanted = [path for path, found in kinds.items() if kind == "mixer" or is_attention(found)]
    if not wanted:
        raise _HasNoneError(f"the mixer is no attention ({', '.join(kinds.values())}): mixer.L is its site.")
    if len(wanted) > 1:
        raise UsageError(f"there are {len(wanted)} mixers ({', '.join(wanted)}): name one as module:PATH:in.")
    return wanted[0]


def _nearest(model: Any, name: str) -> str:
    """Return a sentence that lists sites with a similar name, module or TransformerLens name; "" if there are none."""
    try:
        known: dict[str, str] = {}
        for site in offered(model):
            for text in (site.name, site.hook_name, site.module):
                known.setdefault(text, site.name)
    except UsageError:
        return ""
    near = dict.fromkeys(known[text] for text in difflib.get_close_matches(name, known, n=3, cutoff=0.4))
    return f" Nearest: {', '.join(near)}." if near else ""


def _module_site(model: Any, name: str) -> SiteSpec:
    parts = re.fullmatch(r"module:(.+):(in|out)", name)
    if parts is None:
        raise UsageError(f"{name!r} is not a site. A site is {KINDS}, for instance module:model.norm:out.")
    path, hook = parts[1], parts[2]
    paths = [p for p, _ in model.named_modules() if p]
    if path not in paths:
        near = difflib.get_close_matches(path, paths, n=3, cutoff=0.3)
        raise UsageError(f"Site {name!r}: this model has no module {path!r}. Nearest: {', '.join(near) or 'none'}.")
    side: Side = "in" if hook == "in" else "out"
    return SiteSpec(
        name=name,
        folder=_folder(f"module.{path}.{hook}"),
        module=path,
        hook=side,
        hook_name=path,
        d_in=_width(model, path, side, name),
    )


def _folder(name: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    if safe == name and len(safe) <= 200:
        return safe
    # The hash keeps two names from sharing a folder.
    return f"{safe[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _width(model: Any, path: str, side: Side, name: str) -> int:
    """Measure the width of a module's input or output in a pass over two contexts of three tokens."""
    seen: list[Any] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(first_argument(args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    module = model.get_submodule(path)
    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if side == "in"
        else module.register_forward_hook(after)
    )
    try:
        device = next(model.parameters()).device
        with torch.inference_mode():
            # Without a cache transformers reads the values of positions, and `meta` tensors have no values.
            model(input_ids=torch.zeros(2, 3, dtype=torch.long, device=device), use_cache=True)
    finally:
        handle.remove()
    shape = tuple(seen[0].shape) if seen and isinstance(seen[0], Tensor) else None
    if shape is None or shape[:-1] not in ((2, 3), (6,)):
        found = "is never reached" if not seen else f"gives {shape or type(seen[0]).__name__}"
        raise UsageError(
            f"Site {name!r}: the module {found}. A site needs one vector for each token, (contexts, context_size, d)."
        )
    return int(shape[-1])
