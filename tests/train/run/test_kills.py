"""A run that is killed around every write, or at random, ends in the same files as one that was not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gsae.store import Store
from gsae.tests.support.children import start
from gsae.tests.support.training_kills import around_every_write, at_random

pytestmark = pytest.mark.kill


def found_by(work: Callable[..., None], store: Store, folders: dict[Path, tuple[Any, ...]]) -> list[dict[str, Any]]:
    for folder in folders:
        folder.mkdir()
    processes = [start(work, store.path, folder, *arguments) for folder, arguments in folders.items()]
    for process in processes:
        process.join()
    return [json.loads((folder / "found.json").read_text()) for folder in folders]


@pytest.mark.parametrize("behind", [False, True], ids=["waiting", "behind"])
def test_a_run_killed_around_every_write_of_its_folder_completes_to_the_same_bytes(
    tiny_store: Store, memory: Path, behind: bool
) -> None:
    folders = {memory / "even": (0, behind), memory / "odd": (1, behind)}
    for found in found_by(around_every_write, tiny_store, folders):
        assert found["faults"] == []
        assert found["calls"] > 50
        assert found["of_the_writer"] > 20
        assert found["missed"] <= 5 * behind
        assert found["resampled"] > 0


def test_runs_that_save_every_1_7_and_100_steps_stopped_at_20_random_moments_end_alike(
    tiny_store: Store, memory: Path
) -> None:
    folders = {memory / "waiting": (7, False), memory / "behind": (7, True)}
    for found in found_by(at_random, tiny_store, folders):
        assert found["faults"] == []
        assert found["found"] >= 20
        assert found["resampled"] > 0
