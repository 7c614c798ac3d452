"""The direct effect of a direction at a site on the logits, without the later layers; and the texts of token ids.

The modules on the way to the logits are found by one pass and not by name: the output embedding, the norm before it,
and for `attn.L` and `mixer.L` the output projection and the norm after it (Gemma 2 and 3, OLMo 2 and GLM-4 have one).
The gain of a norm is measured with a test vector, so Gemma's 1 + weight needs no special case. The division by the norm
of the stream is left out, because it depends on the token.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gsae.store import SiteSpec

from .capture import LanguageModel, StopPass

# Relative difference below which two outputs of a norm count as equal, in the model's dtype.
ALIKE = 1e-3


def logit_effects(lm: LanguageModel, site: SiteSpec) -> Callable[[Tensor], Tensor] | None:
    """Return a function from directions (n, d_in) to effects (n, vocabulary), float32; None if there is no direct path.

    There is one from `resid.L`, `resid_mid.L`, `embed`, `mlp.L`, `attn.L` and `mixer.L`, in models that have a norm
    right before the output embedding.
    """
    kind = site.name.split(".")[0]
    if kind not in ("resid", "mlp", "attn", "mixer", "resid_mid", "embed"):
        return None
    head = lm.model.get_output_embeddings()
    projection = lm.model.get_submodule(site.module) if kind in ("attn", "mixer") else None
    last, branch_norm = _norms(lm, head, projection)
    if last is None:
        return None
    unembedding = _before_norm(last, head.weight.detach().float())
    if branch_norm is not None:
        unembedding = _before_norm(branch_norm, unembedding)
    if projection is not None:
        unembedding = unembedding @ _matrix_of(projection)
    return lambda directions: directions.to(unembedding.device) @ unembedding.T


def token_texts(tokenizer: Any) -> list[str]:
    """Return the text of every token id, decoded alone."""
    ids = [[token] for token in range(len(tokenizer))]
    return [str(text) for text in tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)]


def _norms(lm: LanguageModel, head: nn.Module, projection: nn.Module | None) -> tuple[Any, Any]:
    """Return the norm before the output embedding, and the norm after a projection; None for each that is missing.

    A norm is a module with a vector as its weight.
    """
    # By the address of a tensor; the tensor is kept, so that no other one gets its address.
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    norm_inputs: dict[int, tuple[nn.Module, Tensor]] = {}
    head_inputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and _is_norm(module):
            norm_inputs[args[0].data_ptr()] = (module, args[0])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and getattr(module, "weight", None) is not None:
            outputs[output.data_ptr()] = (module, output)

    def end(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        head_inputs.append(args[0])
        raise StopPass

    with ExitStack() as hooks, torch.inference_mode():
        hooks.callback(head.register_forward_pre_hook(end).remove)
        for module in lm.model.modules():
            hooks.callback(module.register_forward_pre_hook(before).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        with suppress(StopPass):
            lm.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=lm.device), use_cache=False)
    last, _ = outputs.get(head_inputs[0].data_ptr(), (None, None))
    addresses = (address for address, (module, _) in outputs.items() if module is projection)
    branch_norm, _ = norm_inputs.get(next(addresses, -1), (None, None))
    return last if last is not None and _is_norm(last) else None, branch_norm


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _before_norm(norm: nn.Module, unembedding: Tensor) -> Tensor:
    """Return the matrix (vocabulary, d_model) for vectors before a norm, given `unembedding` for those after it."""
    gain, subtracts_mean = _gain_of(norm, unembedding.shape[1])
    before = unembedding * gain
    return before - before.mean(1, keepdim=True) if subtracts_mean else before


def _gain_of(norm: Any, d_model: int) -> tuple[Tensor, bool]:
    """Return a norm's gain (d_model,), float32, and whether it subtracts the mean.

    A vector of alternating 1 and -1 has mean 0 and mean square 1, so LayerNorm and RMSNorm apply only gain and bias.
    """
    weight = norm.weight
    probe = torch.ones(d_model, dtype=weight.dtype, device=weight.device)
    probe[1::2] = -1
    with torch.inference_mode():
        there, back, moved = (norm(x[None, None])[0, 0].float() for x in (probe, -probe, probe + 1))
    gain = (there - back) / 2 * probe.float()
    return gain, bool((moved - there).norm() <= ALIKE * there.norm())


def _matrix_of(projection: Any) -> Tensor:
    """Return a projection's matrix (d_model, d_in), float32; GPT-2's Conv1D holds its matrix transposed."""
    weight: Tensor = projection.weight.detach().float()
    return weight if isinstance(projection, nn.Linear) else weight.T
