"""The effects of editing one site on the predictions of a language model: cross-entropies and KL divergences.

Every pass ends before the output embedding, and the blocks before the site run once for all edits. Logits are then
computed for a slice of positions at a time, those of the unedited model once for all edits. So memory is four slices of
logits and one hidden state for each condition and each block before the site, whatever the size of the vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gsae.store import SiteSpec

from .capture import LanguageModel, StopPass, hooked
from .replay import blocks_around, recording, replaying

Edit = Callable[[Tensor], Tensor]
"""Takes the activations (contexts, context_size, d_in) of a site, returns those that the model continues with."""

# Logits of one slice of positions, in elements. On a CPU 8 MB in float32: fresh memory for larger slices is mapped anew
# each time, which took a quarter of the time. Elsewhere 128 MB.
SLICE_ELEMENTS = {"cpu": 1 << 21, "elsewhere": 1 << 25}


def effects(lm: LanguageModel, site: SiteSpec, tokens: Tensor, edits: Sequence[Edit] = ()) -> tuple[Tensor, Tensor]:
    """Return next-token cross-entropies and divergences, of the unedited model first, then of each edit.

    Both are float32 (1 + edits, contexts, context_size - 1), in nats, on the CPU. A divergence is
    KL(unedited || edited) of the next-token distributions; that of the unedited model is 0.
    tokens: (contexts, context_size). Each edit is called once, with the activations of all contexts.
    """
    tokens = tokens.to(lm.device, torch.long)
    targets = tokens[:, 1:].reshape(-1)
    head = lm.model.get_output_embeddings()
    with torch.inference_mode():
        hidden = _all_before_head(lm, head, site, tokens, edits)
        of_one_token: dict[nn.Module, Any] = {}
        with recording([block for some in blocks_around(lm.model, site) for block in some], of_one_token):
            _before_head(lm, head, site, tokens[:1, :1], None)
        with replaying(of_one_token):
            parts = [_compared(lm, head, hidden, targets, part) for part in _slices(len(targets), head.weight)]
    shape = (len(hidden), len(tokens), tokens.shape[1] - 1)
    losses, divergences = (torch.cat(column, dim=1).reshape(shape) for column in zip(*parts, strict=True))
    return losses, divergences


def _slices(positions: int, weight: Tensor) -> Iterator[slice]:
    kind = "cpu" if weight.device.type == "cpu" else "elsewhere"
    step = max(SLICE_ELEMENTS[kind] // len(weight), 1)
    yield from (slice(first, first + step) for first in range(0, positions, step))


def _compared(
    lm: LanguageModel, head: nn.Module, hidden: Sequence[Tensor], targets: Tensor, part: slice
) -> tuple[Tensor, Tensor]:
    """Return cross-entropies and divergences (conditions, positions) of a slice of positions, on the CPU."""
    unedited, *edited = hidden
    clean = _log_probabilities(lm, head, unedited[part])
    probabilities = clean.exp()
    losses, divergences = [_cross_entropies(clean, targets[part])], [torch.zeros(len(clean))]
    for each in edited:
        found = _log_probabilities(lm, head, each[part])
        losses.append(_cross_entropies(found, targets[part]))
        divergences.append(torch.linalg.vecdot(probabilities, torch.sub(clean, found, out=found)).cpu())
    return torch.stack(losses), torch.stack(divergences)


def _cross_entropies(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    # The output embedding may be on another device than the input embedding.
    return -log_probabilities.gather(-1, targets[:, None].to(log_probabilities.device))[:, 0].cpu()


def _log_probabilities(lm: LanguageModel, head: nn.Module, hidden: Tensor) -> Tensor:
    """Return float32 log-probabilities (positions, vocabulary) of `hidden` (positions, d_model).

    The head gets `hidden` in place of its input, in a pass over one token whose blocks compute nothing. So the model's
    own code does what it does to the logits after the head (scaling, soft-capping).
    """
    handle = head.register_forward_pre_hook(lambda module, args: (hidden[None],))
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
        logits: Tensor = lm.model(input_ids=token, use_cache=False).logits
    finally:
        handle.remove()
    return logits[0].float().log_softmax(-1)


def _all_before_head(
    lm: LanguageModel, head: nn.Module, site: SiteSpec, tokens: Tensor, edits: Sequence[Edit]
) -> list[Tensor]:
    """Return the input of the output embedding of the unedited model, then of each edit.

    The blocks before the site return what they did in the first pass, if that pays and if the unedited model gives the
    same bits so: in some families later blocks read more of earlier ones than their output.
    """
    earlier, others = blocks_around(lm.model, site)
    outputs: dict[nn.Module, Any] = {}
    with recording(earlier, outputs):
        clean = _before_head(lm, head, site, tokens, None)
    with ExitStack() as passes:
        if len(edits) * len(earlier) > len(others):
            with replaying(outputs):
                again = _before_head(lm, head, site, tokens, None)
            if torch.equal(clean, again):
                passes.enter_context(replaying(outputs))
        return [clean, *(_before_head(lm, head, site, tokens, edit) for edit in edits)]


def _before_head(lm: LanguageModel, head: nn.Module, site: SiteSpec, tokens: Tensor, edit: Edit | None) -> Tensor:
    """Return the input of the output embedding, (contexts * (context_size - 1), d_model), without running it."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        found.append(args[0])
        raise StopPass

    with ExitStack() as hooks:
        hooks.callback(head.register_forward_pre_hook(keep).remove)
        if edit is not None:
            hooks.enter_context(hooked(lm.model, site, tokens.shape, edit))
        with suppress(StopPass):
            lm.model(input_ids=tokens, use_cache=False)
    return found[0][:, :-1].reshape(-1, found[0].shape[-1])
