"""Spliced cross-entropies equal a direct implementation with plain hooks; identity scores 1, zero 0."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gsae.evaluate.splice import CrossEntropies, Edit, score, splice

EXCLUDED = (0, 1, 2)  # BOS, EOS, padding
D_IN = 16
MEAN = torch.linspace(-8, 8, D_IN, dtype=torch.float64)


class Map:
    """An SAE stand-in: any function of the rows."""

    d_in = d_sae = D_IN

    def __init__(self, function: Any) -> None:
        self.function = function

    def encode(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return x

    def decode(self, f: Tensor) -> Tensor:
        return torch.as_tensor(self.function(f))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def llama(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=D_IN, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(request.param)


def some_tokens() -> NDArray[np.int32]:
    """Contexts (5, 12) with BOS at the start, an EOS inside, and padding at the end."""
    tokens = np.random.default_rng(0).integers(3, 50, (5, 12)).astype(np.int32)
    tokens[:, 0], tokens[1, 5], tokens[3, 8:] = 0, 1, 2
    return tokens


@contextmanager
def hooked(module: torch.nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Model:
    """Losses of a Llama with the output of its middle layer's MLP edited; counts its passes."""

    def __init__(self, lm: LlamaForCausalLM) -> None:
        self.lm, self.passes = lm, 0

    def __call__(self, tokens: Tensor, edit: Edit | None) -> Tensor:
        self.passes += 1

        def hook(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
            return output if edit is None else edit(output)

        with hooked(self.lm.model.layers[1].mlp, hook):
            logits = self.lm(tokens).logits.float()
        per_token = torch.nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
        assert per_token.shape == (tokens.shape[0], tokens.shape[1] - 1)
        return per_token


def run(lm: LlamaForCausalLM, norm_limit: float = np.inf, **saes: Map) -> CrossEntropies:
    tokens = some_tokens()
    stored = ~np.isin(tokens, EXCLUDED)
    stored[:, 1] = False  # a dropped position
    return splice(Model(lm), saes, tokens, stored, EXCLUDED, mean=MEAN.numpy(), norm_limit=norm_limit)


def directly(lm: LlamaForCausalLM, function: Any, norm_limit: float) -> list[float]:
    """Summed cross-entropy of each context with a position-by-position hook, in a pass of its own."""
    sums = []
    for row in some_tokens().astype(np.int64):

        def hook(module: torch.nn.Module, args: Any, output: Tensor, row: NDArray[np.int64] = row) -> Tensor:
            changed = output.clone()
            for position, token in enumerate(row):
                x = output[0, position].float()
                if token > 2 and position != 1 and float(x.double().norm()) < norm_limit:
                    changed[0, position] = function(x).to(output.dtype)
            return changed

        with hooked(lm.model.layers[1].mlp, hook), torch.no_grad():
            log_probs = lm(torch.from_numpy(row)[None]).logits[0].double().log_softmax(-1)
        sums.append(-sum(float(log_probs[p, t]) for p, t in enumerate(row[1:]) if t > 2))
    return sums


def limits(lm: LlamaForCausalLM) -> list[float]:
    """No limit, and the median norm of the site's rows, so that about half of them are over it."""
    seen: list[Tensor] = []
    with hooked(lm.model.layers[1].mlp, lambda module, args, output: seen.append(output)), torch.no_grad():
        lm(torch.from_numpy(some_tokens().astype(np.int64)))
    return [np.inf, float(seen[0].float().norm(dim=-1).median()) * 1.0001]


def test_every_condition_equals_plain_hooks(llama: LlamaForCausalLM) -> None:
    for limit in limits(llama):
        found = run(llama, limit, half=Map(lambda x: x / 2), noisy=Map(lambda x: x.roll(1, -1)))
        for sums, function in (
            (found.clean, lambda x: x),
            (found.zero, torch.zeros_like),
            (found.mean, lambda x: MEAN),
            (found.spliced["half"], lambda x: x / 2),
            (found.spliced["noisy"], lambda x: x.roll(1, -1)),
        ):
            # A pass over one context may round bfloat16 products otherwise than a pass over five.
            tolerance = 1e-5 if llama.dtype == torch.float32 else 5e-3
            assert sums.tolist() == pytest.approx(directly(llama, function, limit), rel=tolerance)
        for a, b in (
            (found.clean, found.zero),
            (found.zero, found.mean),
            (found.clean, found.spliced["half"]),
        ):
            assert np.abs(a / b - 1).max() > 2 * tolerance  # or agreement would mean nothing


def test_identity_scores_exactly_one_and_zero_exactly_zero(llama: LlamaForCausalLM) -> None:
    for limit in limits(llama):
        found = run(llama, limit, identity=Map(lambda x: x), nothing=Map(lambda x: x * 0))
        assert found.score("identity") == 1.0
        assert found.score_mean("identity") == 1.0
        assert found.score("nothing") == 0.0
        assert np.array_equal(found.spliced["identity"], found.clean)


def test_an_sae_that_returns_the_mean_scores_zero_against_mean_ablation(llama: LlamaForCausalLM) -> None:
    found = run(llama, average=Map(lambda x: MEAN.float().expand_as(x)))
    assert found.score_mean("average") == 0.0


def test_only_tokens_that_are_no_special_token_are_counted(llama: LlamaForCausalLM) -> None:
    found = run(llama)
    assert found.tokens.tolist() == [11, 10, 11, 7, 11]
    assert found.spliced == {}


def test_clean_and_ablated_passes_are_shared(llama: LlamaForCausalLM) -> None:
    model, tokens = Model(llama), some_tokens()
    saes = {str(i): Map(lambda x: x) for i in range(4)}
    splice(model, saes, tokens, tokens > 2, EXCLUDED, mean=np.zeros(D_IN), norm_limit=np.inf)
    assert model.passes == 3 + 4


def test_groups_of_contexts_give_the_same_sums(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(llama, half=Map(lambda x: x / 2))
    monkeypatch.setattr("gsae.evaluate.splice.GROUP_TOKENS", 24)
    cut = run(llama, half=Map(lambda x: x / 2))
    tolerance = 1e-5 if llama.dtype == torch.float32 else 5e-3
    assert cut.spliced["half"] == pytest.approx(whole.spliced["half"], rel=tolerance)
    assert cut.tokens.tolist() == whole.tokens.tolist()


def test_a_loss_at_a_special_token_may_be_anything() -> None:
    tokens = some_tokens()

    def losses(ids: Tensor, edit: Edit | None) -> Tensor:
        return torch.where(ids[:, 1:] > 2, 1.0, torch.nan)

    found = splice(losses, {}, tokens, tokens > 2, EXCLUDED, mean=np.zeros(D_IN), norm_limit=np.inf)
    assert found.clean.tolist() == found.tokens.tolist()


def test_a_score_without_a_loss_to_recover_is_none() -> None:
    same = np.ones(3)
    assert score(same, same, same) is None
