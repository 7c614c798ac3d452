"""The real SmolLM2-135M, from its package: it loads, predicts English, and harvests to the same bytes."""

import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from gsae.harvest import HarvestConfig, LanguageModel, Worker, capture, effects, harvest, load_lm, resolve, special_ids
from gsae.tests.support.children import files, finish, start
from gsae.tests.support.texts import contexts_of

ENGLISH = (
    "The lighthouse stood at the end of the harbour, and every evening its light swept across the water. "
    "Fishermen who came home late in the autumn storms said that they had seen it from twenty miles away. "
    "When the keeper grew old, his daughter learned to climb the stairs and clean the great lens herself."
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a CPU without bfloat16 products takes minutes


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_lm("builtin:smollm2-135m-instruct-q4")


def test_plain_english_has_a_low_loss_and_shuffled_words_do_not(lm: LanguageModel) -> None:
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


def test_its_special_tokens_are_never_encoded_from_text(lm: LanguageModel) -> None:
    special = special_ids(lm.tokenizer)
    assert (special.bos_id, special.eos_id) == (1, 2)
    assert special.excluded_ids == tuple(range(17))
    text = "<|im_start|>user <repo_name> <|endoftext|>"
    made = contexts_of([text], lm.tokenizer, context_size=64)
    body = made.tokens[0, 1:]
    assert lm.tokenizer.decode(body[body != 2].tolist()) == text
    assert not set(body[body != 2].tolist()) & set(special.excluded_ids)


def test_layers_after_the_site_do_not_run(lm: LanguageModel) -> None:
    ran, sites = [], resolve(lm.model, ["mlp.10"])
    handles = [
        layer.register_forward_pre_hook(lambda m, a, i=i: ran.append(i))
        for i, layer in enumerate(lm.model.model.layers)
    ]
    found = capture(lm, sites, torch.arange(100, 132)[None])
    for handle in handles:
        handle.remove()
    assert found["mlp.10"].shape == (1, 32, 576)
    assert ran == list(range(11))


HARVEST = {"dataset": "builtin:pydoc", "rows": 1500, "context_size": 64, "window_rows": 512, "threads": 1}


def work(out: Path, rank: int, world_size: int, pause: float = 0.0) -> None:
    """Run a worker that harvests early layers, slowed down so that a kill finds it at work."""
    asked = HarvestConfig(**HARVEST, model="builtin:smollm2-135m", sites=("mlp.2", "resid.1"), max_documents=8)
    harvest(asked, out, lambda event: time.sleep(pause), worker=Worker(rank, world_size))


def assert_all_succeed(processes: list[BaseProcess]) -> None:
    """Wait for the processes and check that each exits with 0."""
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_its_store_has_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    """One worker; two; three, of which one is killed twice; and two of torchrun."""
    one, two, three, torch_run = (tmp_path / name for name in ("one", "two", "three", "torchrun"))
    finish(work, one, 0, 1)
    expected = files(one)
    assert_all_succeed([start(work, two, rank, 2) for rank in range(2)])
    assert files(two) == expected
    others = [start(work, three, rank, 3) for rank in (0, 2)]
    for windows in (0, 1):
        victim = start(work, three, 1, 3, 0.05)
        while victim.is_alive() and len(list(three.glob("shards/*"))) <= windows:
            time.sleep(0.005)
        victim.kill()
        victim.join()
    assert_all_succeed([*others, start(work, three, 1, 3)])
    assert files(three) == expected
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gsae.cli"]
    command += ["harvest", "--model", "builtin:smollm2-135m", "--site", "mlp.2,resid.1", "--device", "cpu"]
    command += ["--max-documents", "8", "--out", str(torch_run)]
    for name, value in HARVEST.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    subprocess.run(command, check=True, capture_output=True)
    assert files(torch_run) == expected
