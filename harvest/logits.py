"""What a direction at a site adds to the logits by itself, past all later layers; and the texts of token ids.

The way is read off one pass, not off names: the output embedding, the norm whose output it takes in (its gain is
probed, so Gemma's 1 + weight needs no special case), and for `attn.L` the output projection. The norm's division is
left out, and so is a norm of its own that a branch ends in.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gsae.store import SiteSpec

from .lm import Complete, LanguageModel

ALIKE = 1e-3  # relative, in the model's dtype


def logit_effects(lm: LanguageModel, site: SiteSpec) -> Callable[[Tensor], Tensor] | None:
    """Return the map of directions (n, d_in) to effects (n, vocabulary), float32; None where there is no direct way.

    There is one from `resid.L`, `mlp.L` and `attn.L`, unless no norm stands right before the output embedding.
    """
    kind = site.name.split(".")[0]
    head = lm.model.get_output_embeddings()
    norm = _last_norm(lm, head)
    if kind not in ("resid", "mlp", "attn") or norm is None:
        return None
    d_model = head.weight.shape[1]
    gain, centres = _probed(norm, d_model)
    unembedding = head.weight.detach().float() * gain
    if centres:
        unembedding = unembedding - unembedding.mean(1, keepdim=True)
    if kind == "attn":
        unembedding = unembedding @ _matrix(lm.model.get_submodule(site.module))
    return lambda directions: directions.to(unembedding.device) @ unembedding.T


def token_texts(tokenizer: Any) -> list[str]:
    """Return the text of every token id, each decoded by itself."""
    ids = [[token] for token in range(len(tokenizer))]
    return [str(text) for text in tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)]


def _last_norm(lm: LanguageModel, head: nn.Module) -> nn.Module | None:
    """Return the module whose output the output embedding takes in, if its weight is a vector."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    entered: list[Tensor] = []

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and getattr(module, "weight", None) is not None:
            made[output.data_ptr()] = (module, output)  # kept, so that no other output gets its memory

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        entered.append(args[0])
        raise Complete

    with ExitStack() as hooks, torch.inference_mode():
        hooks.callback(head.register_forward_pre_hook(before).remove)
        for module in lm.model.modules():
            hooks.callback(module.register_forward_hook(after).remove)
        with suppress(Complete):
            lm.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=lm.device), use_cache=False)
    module, _ = made.get(entered[0].data_ptr(), (None, None))
    return module if module is not None and module.weight.ndim == 1 else None


def _probed(norm: Any, d_model: int) -> tuple[Tensor, bool]:
    """Return a norm's gain (d_model,), float32, and whether it takes the mean off.

    A vector of 1 and -1 in turn has mean 0 and mean square 1, so LayerNorm and RMSNorm leave it, but for gain and bias.
    """
    weight = norm.weight
    probe = torch.ones(d_model, dtype=weight.dtype, device=weight.device)
    probe[1::2] = -1
    with torch.inference_mode():
        there, back, moved = (norm(x[None, None])[0, 0].float() for x in (probe, -probe, probe + 1))
    gain = (there - back) / 2 * probe.float()
    return gain, bool((moved - there).norm() <= ALIKE * there.norm())


def _matrix(projection: Any) -> Tensor:
    """Return a projection's matrix (d_model, d_in), float32: that of an nn.Linear, or of GPT-2's transposed one."""
    weight: Tensor = projection.weight.detach().float()
    return weight if isinstance(projection, nn.Linear) else weight.T
