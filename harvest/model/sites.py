"""From site names to modules of the model, found by structure, so that no list of model families is needed.

The decoder is the first list of layers in which every layer has an MLP and some layer has an attention. An attention is
a child with "att" in its name and a projection to the model's width inside. An MLP is the last other child with such a
projection, or the child with most of the weights (experts). This works on the `meta` device, so widths are known before
weights are loaded. Any other module is named by its path; its width costs a pass over two short contexts.
"""

import difflib
import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gsae.errors import UsageError
from gsae.store import SiteSpec

Kind = Literal["resid", "mlp", "attn"]
KINDS = "resid.L, mlp.L, attn.L or module:PATH:in|out"
HOOK_NAMES: dict[Kind, str] = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "attn.hook_z"}
# Norms between the MLP and the residual stream, in the families that have one.
POST_MLP_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
NAME = re.compile(r"(resid|mlp|attn)\.(?:(all)|(-?[0-9]+)(?:-(-?[0-9]+))?)")


def split_names(text: str) -> list[str]:
    """Split a list such as `mlp.0,4,8-10,attn.3`, in which a number alone is another layer of the kind before it."""
    names: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if re.fullmatch(r"-?[0-9]+(-{1,2}[0-9]+)?", part) and names and NAME.fullmatch(names[-1]):
            part = f"{names[-1].split('.')[0]}.{part}"
        names.append(part)
    return names


def resolve(model: Any, names: Iterable[str]) -> tuple[SiteSpec, ...]:
    """Return the sites of a transformers model that `names` stand for, in their order.

    `resid.L` is the output of decoder layer L, `mlp.L` is what its MLP branch adds to the residual stream, and
    `attn.L` is the concatenated output of the heads, before the output projection. L counts from 0, or back from -1 for
    the last layer; it may be a range (`resid.10-14`) or `all`. `module:PATH:in` and `module:PATH:out` are the first
    input and the output of any module. Raises UsageError for a name of another form, a site that this model does not
    have, and a site that is named twice.
    """
    decoder = cache(lambda: _decoder(model))
    sites = tuple(site for name in names for site in _sites(model, name, decoder))
    found: set[str] = set()
    for site in sites:
        if site.name in found:
            raise UsageError(f"Site {site.name!r} is named twice.")
        found.add(site.name)
    return sites


def offered(model: Any) -> Iterator[SiteSpec]:
    """Yield the sites of all layers of a transformers model; raises UsageError if it has no decoder layers."""
    decoder = _decoder(model)
    for kind in HOOK_NAMES:
        for number, layer in enumerate(decoder.layers):
            if kind != "attn" or _attention(layer, decoder.d_model):
                yield _site(decoder, kind, number)


def layers(model: Any) -> dict[str, nn.Module]:
    """Return the decoder layers of a transformers model by path; raises UsageError if it has none."""
    decoder = _decoder(model)
    return {f"{decoder.path}.{number}": layer for number, layer in enumerate(decoder.layers)}


@dataclass(frozen=True)
class Decoder:
    """The decoder layers of a model, their path in it, and the width of its residual stream."""

    path: str
    layers: nn.ModuleList
    d_model: int


def _sites(model: Any, name: str, find_decoder: Callable[[], Decoder]) -> Iterator[SiteSpec]:
    """Yield the sites that a name stands for."""
    if name.startswith("module:"):
        yield _module_site(model, name)
        return
    parts = NAME.fullmatch(name)
    if parts is None:
        raise UsageError(f"{name!r} is not a site. A site is {KINDS}, for instance mlp.10.{_nearest(model, name)}")
    try:
        decoder = find_decoder()
    except UsageError as error:
        raise UsageError(f"Site {name!r}: {error}") from None
    kind: Kind = parts[1]  # type: ignore[assignment]
    count = len(decoder.layers)
    first, last = (0, count - 1) if parts[2] else (int(parts[3]), int(parts[4] or parts[3]))
    first, last = (layer + (count if layer < 0 else 0) for layer in (first, last))
    if not 0 <= first <= last < count:
        raise UsageError(f"Site {name!r}: this model has layers 0 to {count - 1}.")
    for layer in range(first, last + 1):
        if kind == "attn" and not _attention(decoder.layers[layer], decoder.d_model):
            if parts[2]:
                continue
            raise UsageError(f"Site {name!r}: layer {layer} has no attention with an output projection.")
        yield _site(decoder, kind, layer)


def _site(decoder: Decoder, kind: Kind, number: int) -> SiteSpec:
    inside, hook, width = _locate(decoder.layers[number], kind, decoder.d_model)
    return SiteSpec(
        name=f"{kind}.{number}",
        folder=f"{kind}.{number}",
        module=".".join(part for part in (decoder.path, str(number), inside) if part),
        hook=hook,
        hook_name=f"blocks.{number}.{HOOK_NAMES[kind]}",
        d_in=width,
    )


def _decoder(model: Any) -> Decoder:
    """Find the decoder's layers."""
    d_model = int(model.config.get_text_config().hidden_size)
    for path, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or not all(_mlp(layer, d_model) for layer in layers):
            continue
        if any(_attention(layer, d_model) for layer in layers):
            return Decoder(path, layers, d_model)
    raise UsageError(
        f"no decoder layers were recognised in {type(model).__name__}. "
        "Name the module itself, as module:PATH:in or module:PATH:out."
    )


def _locate(layer: nn.Module, kind: Kind, d_model: int) -> tuple[str, Literal["in", "out"], int]:
    """Return the path of a site's module in its layer, the side of the module, and the width of the site."""
    if kind == "resid":
        return "", "out", d_model
    if kind == "mlp":
        norm = next((name for name in POST_MLP_NORMS if hasattr(layer, name)), None)
        return norm or _mlp(layer, d_model), "out", d_model
    path = _attention(layer, d_model)
    return path, "in", _features(layer.get_submodule(path))[0]


def _attention(layer: nn.Module, d_model: int) -> str:
    """Return the path in a layer of its attention's output projection, "" if it has none."""
    for name, child in layer.named_children():
        if "att" in name and (last := _last_projection(child, d_model)):
            return f"{name}.{last}"
    return ""


def _mlp(layer: nn.Module, d_model: int) -> str:
    """Return the path in a layer of the module with the output that its MLP adds, "" if it has none."""
    others = {name: child for name, child in layer.named_children() if "att" not in name}
    ending = [name for name, child in others.items() if _gives(child, d_model) or _last_projection(child, d_model)]
    if ending:
        name = ending[-1]
        # Bloom's MLP adds the residual itself; what it adds is the output of its last projection.
        if "residual" in inspect.signature(others[name].forward).parameters:
            return f"{name}.{_last_projection(others[name], d_model)}"
        return name
    sizes = {
        name: sum(p.numel() for p in child.parameters())
        for name, child in others.items()
        if any(p.dim() > 1 for p in child.parameters())
    }
    return max(sizes, key=sizes.__getitem__, default="")


def _last_projection(module: nn.Module, d_model: int) -> str:
    """Return the path of the last projection to d_model inside a module, "" if it has none."""
    return next((path for path, m in reversed(list(module.named_modules())) if path and _gives(m, d_model)), "")


def _gives(module: nn.Module, width: int) -> bool:
    return _features(module)[1] == width


def _features(module: nn.Module) -> tuple[int, int]:
    """Return the input and output width of a projection (nn.Linear, or GPT-2's Conv1D), zeros for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    nx, nf = getattr(module, "nx", 0), getattr(module, "nf", 0)
    return (nx, nf) if isinstance(nx, int) and isinstance(nf, int) else (0, 0)


def _nearest(model: Any, name: str) -> str:
    """Return a sentence that lists sites with a similar name, module or TransformerLens name; "" if there are none."""
    try:
        known = {text: site.name for site in offered(model) for text in (site.name, site.hook_name, site.module)}
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
    side: Literal["in", "out"] = "in" if hook == "in" else "out"
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


def _width(model: Any, path: str, side: Literal["in", "out"], name: str) -> int:
    """Measure the width of a module's input or output in a pass over two contexts of three tokens."""
    seen: list[Any] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values()), None))

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
