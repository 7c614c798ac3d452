"""Spliced losses and divergences equal a direct implementation with plain hooks; identity scores 1, zero 0."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsae.evaluate.splice import CLEAN, EVERYWHERE, MEAN, SAES, ZERO, Edit, Replacements, Spliced, splice
from gsae.harvest import LanguageModel, effects, resolve
from gsae.tests.support.selection import mostly_slow

EXCLUDED = (0, 1, 2)  # BOS, EOS, padding
D_IN = 16
AVERAGE = torch.linspace(-8, 8, D_IN, dtype=torch.float64)


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


@dataclass(frozen=True)
class Case:
    """A tiny random model, one of its sites, and the module whose output or input that is."""

    lm: Any
    site: str
    module: Any
    enters: bool = False

    @property
    def effects(self) -> Any:
        return partial(effects, LanguageModel(self.lm, None, None), resolve(self.lm, [self.site])[0])  # type: ignore[arg-type]

    @contextmanager
    def hooked(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        if self.enters:
            handle = self.module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
        else:
            handle = self.module.register_forward_hook(lambda module, args, output: change(output))
        try:
            yield
        finally:
            handle.remove()

    @property
    def tolerance(self) -> float:
        """A pass over one context may round bfloat16 products differently from a pass over five."""
        return 1e-5 if self.lm.dtype == torch.float32 else 5e-3


def made(family: str) -> Case:
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.5}
    plain = {"hidden_size": D_IN, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    if family.startswith("llama"):
        lm: Any = t.LlamaForCausalLM(t.LlamaConfig(**sizes, **plain, num_key_value_heads=1))
        lm = lm.to(torch.bfloat16 if "16" in family else torch.float32).eval()
        return Case(lm, "mlp.1", lm.model.layers[1].mlp)
    if family == "gpt2":
        own = {"n_embd": D_IN, "n_layer": 3, "n_head": 2, "n_positions": 32}
        lm = t.GPT2LMHeadModel(t.GPT2Config(**sizes, **own)).eval()
        return Case(lm, "attn.1", lm.transformer.h[1].attn.c_proj, enters=True)
    lm = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**sizes, **plain)).eval()
    return Case(lm, "resid.1", lm.gpt_neox.layers[1])


@pytest.fixture(
    scope="module", params=mostly_slow(["llama", "llama-bfloat16", "gpt2", "gpt-neox"], "llama-bfloat16", "gpt2")
)
def case(request: pytest.FixtureRequest) -> Case:
    return made(request.param)


def some_tokens() -> NDArray[np.int32]:
    """Contexts (5, 12) with BOS at the start, an EOS inside, and padding at the end."""
    tokens = np.random.default_rng(0).integers(3, 50, (5, 12)).astype(np.int32)
    tokens[:, 0], tokens[1, 5], tokens[3, 8:] = 0, 1, 2
    return tokens


def run(case: Case, norm_limit: float = np.inf, **saes: Map) -> Spliced:
    tokens = some_tokens()
    stored = ~np.isin(tokens, EXCLUDED)
    stored[:, 1] = False  # a dropped position
    return splice(case.effects, Replacements(saes, AVERAGE.numpy(), norm_limit), tokens, stored, EXCLUDED)


def logits_of(case: Case, row: NDArray[np.int64], change: Callable[[Tensor], Tensor]) -> Tensor:
    with case.hooked(change), torch.no_grad():
        found: Tensor = case.lm(torch.from_numpy(row)[None]).logits[0].double().log_softmax(-1)
    return found


def directly(case: Case, function: Any, limit: float, everywhere: bool = False) -> dict[str, list[float]]:
    """Sums of each context in float64, from one pass for each context with a hook that goes by positions."""
    found: dict[str, list[float]] = {"loss": [], "loss_after": [], "divergence": []}
    for row in some_tokens().astype(np.int64):

        def change(output: Tensor, row: NDArray[np.int64] = row) -> Tensor:
            changed = output.clone()
            for position, token in enumerate(row):
                x = output[0, position].float()
                if everywhere or (token > 2 and position != 1 and float(x.double().norm()) < limit):
                    changed[0, position] = function(x).to(output.dtype)
            return changed

        clean, edited = logits_of(case, row, lambda output: output), logits_of(case, row, change)
        nexts = list(enumerate(row[1:]))
        found["loss"].append(-sum(float(edited[p, t]) for p, t in nexts if t > 2))
        found["loss_after"].append(-sum(float(edited[p, t]) for p, t in nexts if row[p] > 2))
        apart = (clean.exp() * (clean - edited)).sum(-1)
        found["divergence"].append(sum(float(apart[p]) for p, t in nexts if t > 2))
    return found


def limits(case: Case) -> list[float]:
    """No limit, and the median norm of the site's rows, so that about half of them are over it."""
    seen: list[Tensor] = []
    with case.hooked(lambda output: seen.append(output) or output), torch.no_grad():  # type: ignore[func-returns-value]
        case.lm(torch.from_numpy(some_tokens().astype(np.int64)))
    return [np.inf, float(seen[0].float().norm(dim=-1).median()) * 1.0001]


def test_every_condition_equals_plain_hooks(case: Case) -> None:
    for limit in limits(case):
        found = run(case, limit, half=Map(lambda x: x / 2), noisy=Map(lambda x: x.roll(1, -1)))
        for condition, function in (
            (CLEAN, lambda x: x),
            (ZERO, torch.zeros_like),
            (MEAN, lambda x: AVERAGE),
            (EVERYWHERE, torch.zeros_like),
            (found.condition("half"), lambda x: x / 2),
            (found.condition("noisy"), lambda x: x.roll(1, -1)),
        ):
            expected = directly(case, function, limit, everywhere=condition == EVERYWHERE)
            for name, sums in expected.items():
                rough = 10 * case.tolerance if name == "divergence" else 0
                assert getattr(found, name)[condition].tolist() == pytest.approx(sums, rel=case.tolerance, abs=rough)
        for a, b in ((CLEAN, ZERO), (ZERO, MEAN), (ZERO, EVERYWHERE), (CLEAN, SAES)):
            # or agreement would mean nothing
            assert np.abs(found.loss[a] / found.loss[b] - 1).max() > 2 * case.tolerance


def test_the_scores_equal_a_direct_implementation(case: Case) -> None:
    found = run(case, half=Map(lambda x: x / 2))
    none, zero, half = (directly(case, f, np.inf) for f in (lambda x: x, torch.zeros_like, lambda x: x / 2))
    everywhere = directly(case, torch.zeros_like, np.inf, everywhere=True)
    for ablation, ablated, key in ((ZERO, zero, "loss"), (EVERYWHERE, everywhere, "loss_after")):
        clean, spliced = sum(none[key]), sum(half[key])
        score = 1 - (spliced - clean) / (sum(ablated[key]) - clean)
        assert found.score("half", ablation).value == pytest.approx(score, abs=100 * case.tolerance)
    expected = 1 - sum(half["divergence"]) / sum(zero["divergence"])
    assert found.divergence_score("half").value == pytest.approx(expected, abs=100 * case.tolerance)
    tokens = (some_tokens()[:, 1:] > 2).sum()
    assert found.means("half")["ce_loss_with_sae"].value == pytest.approx(sum(half["loss"]) / tokens, rel=1e-2)


def test_identity_scores_exactly_one_and_zero_exactly_zero(case: Case) -> None:
    for limit in limits(case):
        found = run(case, limit, identity=Map(lambda x: x), nothing=Map(lambda x: x * 0))
        for ablation in (ZERO, MEAN, EVERYWHERE):
            assert found.score("identity", ablation).value == 1.0
            assert found.score("identity", ablation).error == 0.0
        assert found.divergence_score("identity").value == 1.0
        assert found.score("nothing").value == 0.0
        assert found.divergence_score("nothing").value == 0.0
        assert np.array_equal(found.loss[found.condition("identity")], found.loss[CLEAN])


def test_an_sae_that_returns_the_mean_scores_zero_against_mean_ablation(case: Case) -> None:
    found = run(case, average=Map(lambda x: AVERAGE.float().expand_as(x)))
    assert found.score("average", MEAN).value == 0.0


def test_joined_groups_of_contexts_equal_one_pass(case: Case) -> None:
    whole, tokens = run(case, half=Map(lambda x: x / 2)), some_tokens()
    stored = ~np.isin(tokens, EXCLUDED)
    stored[:, 1] = False
    half = Replacements({"half": Map(lambda x: x / 2)}, AVERAGE.numpy(), np.inf)
    parts = [
        splice(case.effects, half, tokens[at], stored[at], EXCLUDED) for at in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    joined = Spliced.joined(parts)
    assert joined.loss == pytest.approx(whole.loss, rel=case.tolerance)
    assert joined.tokens.tolist() == whole.tokens.tolist()
    assert joined.score("half").value == pytest.approx(whole.score("half").value, abs=100 * case.tolerance)


def test_special_tokens_are_not_counted() -> None:
    found = run(made("llama"))
    assert found.tokens.tolist() == [11, 10, 11, 7, 11]
    assert found.tokens_after.tolist() == [10, 9, 10, 7, 10]
    assert found.names == ()


def test_all_conditions_are_requested_at_once_so_the_clean_pass_is_shared() -> None:
    asked: list[int] = []

    def counting(ids: Tensor, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
        asked.append(len(edits))
        return (torch.ones(1 + len(edits), len(ids), ids.shape[1] - 1),) * 2

    tokens = some_tokens()
    saes = {str(i): Map(lambda x: x) for i in range(4)}
    splice(counting, Replacements(saes, np.zeros(D_IN), np.inf), tokens, tokens > 2, EXCLUDED)
    assert asked == [3 + 4]


def test_a_loss_at_a_special_token_may_be_anything() -> None:
    tokens = some_tokens()

    def unknown(ids: Tensor, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
        found = torch.where(ids[:, 1:] > 2, 1.0, torch.nan).expand(1 + len(edits), -1, -1)
        return found, found

    found = splice(unknown, Replacements({}, np.zeros(D_IN), np.inf), tokens, tokens > 2, EXCLUDED)
    assert found.loss[CLEAN].tolist() == found.divergence[ZERO].tolist() == found.tokens.tolist()


def test_a_score_without_a_loss_to_recover_is_none() -> None:
    same = np.ones((SAES + 1, 3))
    found = Spliced(("a",), np.ones(3, np.int64), np.ones(3, np.int64), same, same, 0 * same)
    assert found.score("a").value is None
    assert found.divergence_score("a").value is None
