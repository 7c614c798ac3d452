"""The real SmolLM2-135M that comes as a package: that it loads as the language model it is."""

import pytest
import torch

from gsae.harvest import LanguageModel, capture, effects, load_lm, resolve, special_ids
from gsae.tests.texts import contexts_of

ENGLISH = (
    "The lighthouse stood at the end of the harbour, and every evening its light swept across the water. "
    "Fishermen who came home late in the autumn storms said that they had seen it from twenty miles away. "
    "When the keeper grew old, his daughter learned to climb the stairs and clean the great lens herself."
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_lm("builtin:smollm2-135m-instruct-q4")


def test_plain_english_is_likely_and_shuffled_words_are_not(lm: LanguageModel) -> None:
    words = ENGLISH.split()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    (site,) = resolve(lm.model, ["mlp.10"])

    def mean_loss(text: str) -> float:
        made = contexts_of([text], lm.tokenizer, context_size=128)
        length = int((made.tokens[0] != lm.tokenizer.eos_token_id).sum())
        return float(effects(lm, site, torch.from_numpy(made.tokens[:1, :length]))[0].mean())

    # 3.9 nats; guessing blindly costs log 49152 = 10.8.
    assert 2 < mean_loss(ENGLISH) < 4.5
    assert mean_loss(" ".join(words[i] for i in order)) > mean_loss(ENGLISH) + 2


def test_its_special_tokens_never_come_from_text(lm: LanguageModel) -> None:
    special = special_ids(lm.tokenizer)
    assert (special.bos_id, special.eos_id) == (1, 2)
    assert special.excluded_ids == tuple(range(17))
    text = "<|im_start|>user <repo_name> <|endoftext|>"
    made = contexts_of([text], lm.tokenizer, context_size=64)
    body = made.tokens[0, 1:]
    assert lm.tokenizer.decode(body[body != 2].tolist()) == text
    assert not set(body[body != 2].tolist()) & set(special.excluded_ids)


def test_layers_after_the_site_do_not_run(lm: LanguageModel) -> None:
    ran = []
    handles = [
        layer.register_forward_pre_hook(lambda m, a, i=i: ran.append(i))
        for i, layer in enumerate(lm.model.model.layers)
    ]
    found = capture(lm, resolve(lm.model, ["mlp.10"]), torch.arange(100, 132)[None])
    for handle in handles:
        handle.remove()
    assert found["mlp.10"].shape == (1, 32, 576)
    assert ran == list(range(11))
