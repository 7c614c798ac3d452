"""How the suite is organised, and the small real things that many tests share, made once in each test process.

The folders of tests/ mirror the rooms of the package; tests/support/ holds what several test files use. Three commands:

    make quick                       everything without a marker of `HEAVY`, in a minute and a half on two cores
    make test                        everything, in two processes; `WORKERS=8` for more
    .venv/bin/python -m pytest PATH  some tests, in this process

In `make quick` and `make test` pytest-xdist gives each test file to one process, so that what a file's tests share is
made once and one file's browser or S3 server runs once. Files with heavy tests go first: at the end, when one process
has nothing left, the other has only short files. No test relies on an order or on being alone on the machine:

* Files are written below `tmp_path` or `memory` only; ports are chosen by the system.
* Every process computes with one thread, so that two processes do not slow each other down and rows do not depend on
  the number of cores. A test that needs more threads asks for them.
* No limit on seconds is so tight that a busy machine breaks it.

Every warning is an error (`filterwarnings` in pyproject.toml), in all processes.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # imported by the functions below: the process that hands out the tests needs no torch
    from gsae.store import Store

HEAVY = ("slow", "server", "kill", "browser")  # the markers that `make quick` leaves out; pyproject.toml describes them


def pytest_configure() -> None:
    """Give the processes that the tests start one thread each; pytest-xdist's processes are started after this.

    Without a GPU, Triton's kernels are interpreted.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with heavy tests first, in the order of `HEAVY`, and all others after them in their order."""
    rank: dict[Path, int] = {}
    for item in items:
        marked = [place for place, name in enumerate(HEAVY) if item.get_closest_marker(name)]
        rank[item.path] = min([len(HEAVY), rank.get(item.path, len(HEAVY)), *marked])
    items.sort(key=lambda item: rank[item.path])


def pytest_runtest_setup() -> None:
    """Compute with one thread: numba's thread pool, when it starts, sets the number of torch's threads too."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> "Store":
    """A store with site mlp.1 (d_in 32), some 7,500 train rows of sparse sums of 64 known directions, held-out rows."""
    from gsae.tests.support.stores import make_store, sparse_rows

    root: Path = tmp_path_factory.mktemp("tiny") / "store"
    return make_store(root, contexts=300, window_rows=2048, rows=sparse_rows)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a kill leaves does not depend on the disk."""
    shm = Path("/dev/shm")
    folder = shm / f"gsae-{os.getpid()}-{tmp_path.name}" if os.access(shm, os.W_OK) else tmp_path / "memory"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


# --- language models: tiny, random, in transformers' own layout ---


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on the language reference; ids 0 to 3 are special."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([topics[name] for name in sorted(topics)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A directory with a random Llama of 3 layers, d = 32, 4 heads on 2, in bfloat16, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    place = tmp_path_factory.mktemp("models") / "tiny-llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    tiny_tokenizer.save_pretrained(place)
    return place
