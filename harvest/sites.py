"""Site names to places in the model: found by structure, so that one rule serves every Llama-like family.

A decoder is the list of layers that have an `mlp` and a `self_attn.o_proj`. Works on the `meta` device, so
widths are known before weights are loaded. Everything else is reached by its module path, at the cost of a
two-token pass.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gsae.store import SiteSpec, UsageError

KINDS = "resid.L, mlp.L, attn.L or module:PATH:in|out"
HOOK_NAMES = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "attn.hook_z"}
# Norms that some families put between the MLP and the residual stream.
POST_MLP_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")


def resolve(model: Any, names: Iterable[str]) -> tuple[SiteSpec, ...]:
    """Return where the named sites of a transformers model are, in the order of `names`.

    `resid.L` is the output of decoder layer L, `mlp.L` what its MLP branch adds to the residual stream,
    `attn.L` the heads' outputs, concatenated, before the output projection; L counts from 0, or from -1 at
    the end. `module:PATH:in` and `module:PATH:out` are the first input and the output of any module. Raises
    UsageError for a name that is none of these, is not in this model, or comes twice.
    """
    sites = tuple(_site(model, name) for name in names)
    found: dict[str, str] = {}
    for site in sites:
        if site.name in found:
            raise UsageError(f"Site {site.name!r} is named twice.")
        found[site.name] = site.folder
    return sites


def _site(model: Any, name: str) -> SiteSpec:
    if name.startswith("module:"):
        return _module_site(model, name)
    parts = re.fullmatch(r"([A-Za-z_]+)\.(-?[0-9]+)", name)
    if parts is None or parts[1] not in HOOK_NAMES:
        raise UsageError(f"Site {name!r} is not a site. A site is {KINDS}, for instance mlp.10.")
    kind = parts[1]
    path, layers = _layers(model, name)
    layer = int(parts[2]) + (len(layers) if parts[2].startswith("-") else 0)
    if not 0 <= layer < len(layers):
        raise UsageError(f"Site {name!r}: this model has layers 0 to {len(layers) - 1}.")
    inner, hook, width = _place(model, layers[layer], kind, name)
    return SiteSpec(
        name=f"{kind}.{layer}",
        folder=f"{kind}.{layer}",
        module=".".join([path, str(layer), *inner]),
        hook=hook,
        hook_name=f"blocks.{layer}.{HOOK_NAMES[kind]}",
        d_in=width,
    )


def _layers(model: Any, name: str) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the decoder's layers."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(hasattr(layer, "mlp") for layer in module):
            attentions = [getattr(layer, "self_attn", None) for layer in module]
            if any(hasattr(attention, "o_proj") for attention in attentions):
                return path, module
    raise UsageError(
        f"Site {name!r}: no decoder layers were recognised in {type(model).__name__}. "
        "Name the module itself, as module:PATH:in or module:PATH:out."
    )


def _place(model: Any, layer: nn.Module, kind: str, name: str) -> tuple[list[str], Literal["in", "out"], int]:
    """Return a site's path inside its layer, the side of the module, and its width."""
    d_model = int(model.config.get_text_config().hidden_size)
    if kind == "resid":
        return [], "out", d_model
    if kind == "mlp":
        norm = next((n for n in POST_MLP_NORMS if hasattr(layer, n)), "mlp")
        return [norm], "out", d_model
    projection = getattr(getattr(layer, "self_attn", None), "o_proj", None)
    if projection is None:
        raise UsageError(f"Site {name!r}: this layer has no self_attn.o_proj.")
    return ["self_attn", "o_proj"], "in", int(projection.in_features)


def _module_site(model: Any, name: str) -> SiteSpec:
    parts = re.fullmatch(r"module:(.+):(in|out)", name)
    if parts is None:
        raise UsageError(f"Site {name!r} is not a site. A site is {KINDS}, for instance module:model.norm:out.")
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
    # Two names must not become one folder.
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
            # Without a cache transformers looks at the values of positions, which `meta` tensors do not have.
            model(input_ids=torch.zeros(2, 3, dtype=torch.long, device=device), use_cache=True)
    finally:
        handle.remove()
    shape = tuple(seen[0].shape) if seen and isinstance(seen[0], Tensor) else None
    if shape is None or len(shape) != 3 or shape[:2] != (2, 3):
        found = "is never reached" if not seen else f"gives {shape or type(seen[0]).__name__}"
        raise UsageError(
            f"Site {name!r}: the module {found}; one vector a token, (contexts, context_size, d), is needed."
        )
    return shape[2]
