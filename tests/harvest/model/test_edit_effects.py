"""Cross-entropies and divergences of edited passes equal float64 brute force from whole logits and plain hooks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gsae.harvest import LanguageModel, effects, load_lm, resolve

SITES = ["resid.0", "mlp.1", "attn.1", "resid.2", "module:model.layers.0.mlp:in"]


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_lm(str(tiny_llama), dtype="float32")


@pytest.fixture(scope="module")
def tokens(lm: LanguageModel) -> Tensor:
    made = torch.randint(4, 1024, (5, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    made[:, 0] = lm.tokenizer.bos_token_id
    return made


def plain(logits: Tensor, tokens: Tensor) -> Tensor:
    """Next-token losses in float64, from logits and nothing else."""
    return -logits[:, :-1].double().log_softmax(-1).gather(-1, tokens[:, 1:, None].long())[..., 0]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of the next-token distributions in float64, summed word by word."""
    a, b = (logits[:, :-1].double().softmax(-1) for logits in (p, q))
    return (a * (a / b).log()).sum(-1)


def halved(value: Tensor) -> Tensor:
    """Half of the activation with its dimensions turned round, at all positions but the first."""
    return torch.where(torch.arange(value.shape[1])[:, None] > 0, 0.5 * value.flip(-1), value)


def hooked_logits(lm: LanguageModel, name: str, tokens: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    (site,) = resolve(lm.model, [name])
    module = lm.model.get_submodule(site.module)
    if site.hook == "out":
        handle = module.register_forward_hook(lambda m, a, out: edit(out))
    else:
        handle = module.register_forward_pre_hook(lambda m, a: (edit(a[0]), *a[1:]))
    with torch.no_grad():
        logits: Tensor = lm.model(input_ids=tokens.long()).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("elements", [1 << 25, 7 * 1024])
@pytest.mark.parametrize("name", SITES)
def test_losses_and_divergences_equal_brute_force(
    lm: LanguageModel, tokens: Tensor, name: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"cpu": elements, "elsewhere": elements}
    monkeypatch.setattr("gsae.harvest.model.edit_effects.SLICE_ELEMENTS", sizes)
    (site,) = resolve(lm.model, [name])
    losses, divergences = effects(lm, site, tokens, [halved, torch.zeros_like])
    assert losses.shape == divergences.shape == (3, 5, 23)
    assert losses.dtype == divergences.dtype == torch.float32
    with torch.no_grad():
        clean = lm.model(input_ids=tokens.long()).logits
    edited = [hooked_logits(lm, name, tokens, edit) for edit in (halved, torch.zeros_like)]
    for found, logits in zip(losses, [clean, *edited], strict=True):
        torch.testing.assert_close(found.double(), plain(logits, tokens), rtol=1e-4, atol=1e-4)
    for found, logits in zip(divergences[1:], edited, strict=True):
        torch.testing.assert_close(found.double(), divergence(clean, logits), rtol=1e-4, atol=1e-5)
        assert found.mean() > 1e-4
    assert not divergences[0].any()


def test_an_edit_that_changes_nothing_leaves_the_losses_exactly_equal(lm: LanguageModel, tokens: Tensor) -> None:
    (site,) = resolve(lm.model, ["mlp.1"])
    losses, divergences = effects(lm, site, tokens, [lambda value: value, halved])
    assert torch.equal(losses[1], losses[0])
    assert not divergences[1].any()
    assert torch.equal(effects(lm, site, tokens)[0][0], losses[0])


def test_an_edit_gets_the_activations_of_all_contexts_at_once(lm: LanguageModel, tokens: Tensor) -> None:
    shapes = []
    (site,) = resolve(lm.model, ["attn.1"])
    effects(lm, site, tokens, [lambda value: shapes.append(tuple(value.shape)) or value])  # type: ignore[func-returns-value]
    assert shapes == [(5, 24, site.d_in)]


def test_losses_include_the_soft_cap_of_a_family() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        vocab_size=64, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.3, initializer_range=1.0, **sizes
    )
    model = Gemma2ForCausalLM(config).eval()
    tokens = torch.randint(3, 64, (3, 10))
    lm = LanguageModel(model, None, None)  # type: ignore[arg-type]
    (site,) = resolve(model, ["mlp.1"])
    losses, divergences = effects(lm, site, tokens, [torch.zeros_like])
    with torch.no_grad():
        clean = model(input_ids=tokens).logits
    torch.testing.assert_close(losses[0].double(), plain(clean, tokens), rtol=1e-4, atol=1e-4)
    edited = hooked_logits(lm, "mlp.1", tokens, torch.zeros_like)
    torch.testing.assert_close(divergences[1].double(), divergence(clean, edited), rtol=1e-3, atol=1e-6)


def calls_of(module: torch.nn.Module, passes: Callable[[], object]) -> int:
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    passes()
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("name", ["mlp.2", "resid.2", "attn.1", "resid.0"])
def test_the_blocks_before_the_site_run_once_and_give_the_same_bits(
    lm: LanguageModel, tokens: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = resolve(lm.model, [name])
    edits, block = [halved, torch.zeros_like, halved, halved], lm.model.model.layers[0]
    shared = effects(lm, site, tokens, edits)
    computed = calls_of(block.mlp, lambda: effects(lm, site, tokens, edits))
    assert computed == (1 if name != "resid.0" else 1 + len(edits)) + 1  # and once on a single token
    assert "forward" not in vars(block)
    monkeypatch.setattr("gsae.harvest.model.edit_effects.blocks_around", lambda model, site: ([], []))
    for one, other in zip(shared, effects(lm, site, tokens, edits), strict=True):
        assert torch.equal(one, other)


def test_a_model_whose_later_blocks_read_more_of_earlier_ones_than_their_output_runs_whole_passes(
    lm: LanguageModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = resolve(lm.model, ["mlp.2"])
    first, last = lm.model.model.layers[0], lm.model.model.layers[2]
    left: list[Tensor] = []  # by the first block's MLP, for the last block of the same pass, which takes it away
    handles = [
        first.mlp.register_forward_hook(lambda module, args, output: left.append(output)),
        last.register_forward_hook(lambda module, args, output: output + left.pop() if left else output),
    ]
    edits = [halved, torch.zeros_like, halved]
    try:
        found = effects(lm, site, tokens, edits)
        monkeypatch.setattr("gsae.harvest.model.edit_effects.blocks_around", lambda model, site: ([], []))
        expected = effects(lm, site, tokens, edits)
    finally:
        for handle in handles:
            handle.remove()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_block_gets_its_own_forward_back(lm: LanguageModel, tokens: Tensor) -> None:
    (site,) = resolve(lm.model, ["mlp.2"])
    block = lm.model.model.layers[0]
    block.forward = own = block.forward  # as accelerate's hooks set it
    effects(lm, site, tokens, [halved, halved])
    assert vars(block)["forward"] is own
    del block.forward
