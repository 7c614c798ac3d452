"""When memory is short: a batch size that fits is found and kept, a pass is tried twice, and the run ends cleanly."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gsae.errors import IncompatibleError, SpaceError, UsageError
from gsae.harvest import HarvestConfig, LanguageModel, StageStarted, Worker, harvest, load_lm
from gsae.harvest.model.layer_trace import CONTEXTS, TOKENS
from gsae.store import CONFIRMED, verify
from gsae.tests.support.children import files
from gsae.tests.support.command import refused

pytestmark = pytest.mark.slow
Refuses = Callable[[int], bool]
OutOfMemory = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: not enough memory")]


@pytest.fixture(scope="module", autouse=True)
def _small_collections() -> Iterator[None]:
    """A pass that failed is tried again after a garbage collection, which is slow among the imports of all tests."""
    gc.freeze()
    yield
    gc.unfreeze()


def config(model: Path, **changed: Any) -> HarvestConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "dataset": "builtin:pydoc",
        "sites": ("mlp.1",),
        "rows": 3000,
        "context_size": 64,
        "heldout": 0.05,
        "window_rows": 1024,
        "batch_size": 5,
    }
    return HarvestConfig(**(settings | changed))


def short_of_memory(refuses: Refuses, error: Exception = OutOfMemory[0]) -> Callable[[HarvestConfig], LanguageModel]:
    """Return a loader of a model that raises `error` in its second layer for batch sizes that `refuses` accepts."""

    def load(config: HarvestConfig) -> LanguageModel:
        lm = load_lm(config.model)

        def run_out(module: Any, args: tuple[Tensor, ...]) -> None:
            confirming = args[0].shape[:2] == (CONTEXTS, TOKENS)
            if not confirming and refuses(len(args[0])):
                raise error

        lm.model.model.layers[1].register_forward_pre_hook(run_out)
        return lm

    return load


@pytest.mark.parametrize(("most", "found"), [(7, 4), (10**6, 64)])
@pytest.mark.parametrize("error", OutOfMemory)
def test_the_batch_size_that_fits_is_found_and_kept_in_the_plan(
    tiny_llama: Path, tmp_path: Path, most: int, found: int, error: Exception
) -> None:
    """The budget is 4,096 tokens on a CPU, 64 contexts here; it is halved until two passes in a row fit."""
    asked, events = config(tiny_llama, batch_size="auto"), list[Any]()
    store = harvest(asked, tmp_path / "store", events.append, short_of_memory(lambda size: size > most, error))
    assert store is not None
    assert store.plan.batch_size == found
    assert StageStarted("finding the batch size") in events
    same = harvest(config(tiny_llama, batch_size=found), tmp_path / "same")
    assert same is not None
    assert files(same.path) == files(store.path)
    for batch_size in ("auto", found):
        assert harvest(config(tiny_llama, batch_size=batch_size), store.path) is not None
    with pytest.raises(IncompatibleError, match=f"batch_size was {found}, now 99"):
        harvest(config(tiny_llama, batch_size=99), store.path)


def test_if_not_even_one_context_fits_no_plan_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="Not even one context of 64 tokens fits"):
        harvest(config(tiny_llama, batch_size="auto"), tmp_path / "store", load=short_of_memory(lambda size: True))
    assert not (tmp_path / "store" / "plan.json").exists()


def test_a_worker_that_finds_another_batch_size_uses_the_published_plan(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other worker publishes its plan while this one is finding its size."""
    monkeypatch.setattr("gsae.harvest.pipeline.PATIENCE_SECONDS", 0.0)
    out, asked = tmp_path / "store", config(tiny_llama, batch_size="auto")

    def listen(event: Any) -> None:
        if event == StageStarted("finding the batch size"):
            harvest(config(tiny_llama, batch_size=3), out, worker=Worker(0, 2))

    store = harvest(asked, out, listen, worker=Worker(1, 2))
    assert store is not None
    assert store.plan.batch_size == 3
    alone = harvest(config(tiny_llama, batch_size=3), tmp_path / "alone")
    assert alone is not None
    assert files(alone.path) == files(out)


def test_a_batch_that_fails_once_is_run_again_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    calls = 0

    def every_fifth(size: int) -> bool:
        nonlocal calls
        calls += 1
        return calls % 5 == 0

    store = harvest(config(tiny_llama), tmp_path / "store", load=short_of_memory(every_fifth))
    plain = harvest(config(tiny_llama), tmp_path / "plain")
    assert store is not None
    assert plain is not None
    assert calls > 5
    assert files(store.path) == files(plain.path)


@pytest.mark.parametrize("error", OutOfMemory)
def test_a_batch_that_never_fits_ends_the_run_and_a_later_run_continues(
    tiny_llama: Path, tmp_path: Path, error: Exception
) -> None:
    calls, sizes = 0, list[int]()

    def from_the_thirtieth(size: int) -> bool:
        nonlocal calls
        calls += 1
        sizes.append(size)
        return calls >= 30

    out = tmp_path / "store"
    with pytest.raises(SpaceError, match=r"does not fit into memory, tried twice.*smaller --batch-size") as caught:
        harvest(config(tiny_llama), out, load=short_of_memory(from_the_thirtieth, error))
    assert "\n" not in str(caught.value)
    assert calls == 31
    assert sizes[-1] == sizes[-2]
    made = {name: data for name, data in files(out).items() if not name.startswith(".tmp") and name != CONFIRMED}
    assert any(name.startswith("shards/") for name in made)
    store = harvest(config(tiny_llama), out)
    assert store is not None
    assert verify(store, deep=True) == []
    assert made.items() <= files(out).items()


def test_other_errors_of_a_pass_are_not_tried_again(tiny_llama: Path, tmp_path: Path) -> None:
    calls = 0

    def count(size: int) -> bool:
        nonlocal calls
        calls += 1
        return True

    with pytest.raises(UsageError, match=r"over tokens of shape \(4, 64\) fails: RuntimeError: device-side assert"):
        harvest(config(tiny_llama), tmp_path / "s", load=short_of_memory(count, RuntimeError("device-side assert")))
    assert calls == 1


def test_a_batch_size_is_a_number_or_auto(tmp_path: Path) -> None:
    known = ["harvest", "--model", "m", "--dataset", "d", "--site", "mlp.1", "--out", tmp_path / "s"]
    refused(
        2,
        "batch_size: got 'many'; needed: a number greater than or equal to 1, or auto",
        *known,
        "--batch-size",
        "many",
    )
    refused(2, "batch_size", *known, "--batch-size", "0")
