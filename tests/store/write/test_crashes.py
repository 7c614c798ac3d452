"""Killed, held or out of space at any moment: a repeated write ends in the same bytes and leaves no other files."""

import multiprocessing
import resource
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gsae.errors import SpaceError
from gsae.files import TMP, sweep
from gsae.store import open_store, seal, verify
from gsae.tests.support.calls import Call, recorded
from gsae.tests.support.children import files, start
from gsae.tests.support.killing import (
    Step,
    assert_survives_every_kill,
    begin,
    stop_in_a_window,
    write_held_at_barrier,
    write_three_windows,
    write_windows,
)


@pytest.mark.kill
@pytest.mark.parametrize(
    ("before", "step"),
    [(None, begin), (begin, write_windows), (stop_in_a_window, seal)],
    ids=["plan", "windows", "seal"],
)
def test_killed_before_or_after_any_call_the_same_step_ends_in_the_same_files(
    memory: Path, before: Step | None, step: Step
) -> None:
    assert_survives_every_kill(before, step, memory, calls=30)


def calls_of_a_write(root: Path) -> list[Call]:
    return recorded(root, lambda: write_three_windows(root))


def test_a_file_is_durable_before_it_has_its_name_and_its_name_before_what_refers_to_it(memory: Path) -> None:
    calls = calls_of_a_write(memory / "store")
    links = [i for i, call in enumerate(calls) if call.kind == "link"]
    refer = [i for i in links if calls[i].path.endswith(".json")]  # plan, metadata, records and manifest
    assert len(links) > 20
    for i in links:
        temp = [call.kind for call in calls[:i] if call.path == calls[i].source]
        assert temp[-1] == "fsync"
        assert set(temp[:-1]) == {"open", "write"}
        following = next((r for r in refer if r > i), len(calls))
        synced = {call.path for call in calls[i:following] if call.kind == "fsync"}
        assert synced >= {str(folder) for folder in Path(calls[i].path).parents}


def test_the_files_of_a_window_are_published_together_and_each_folder_is_synced_once(memory: Path) -> None:
    calls = calls_of_a_write(memory / "store")
    at = {call.path: i for i, call in enumerate(calls) if call.kind == "link"}
    window = ["train/mlp.1/c/1/0", "train/source/c/1"]
    first, last, record = (at[name] for name in (*window, "shards/train-00001.json"))
    temps = {calls[at[name]].source for name in window}
    assert temps <= {call.path for call in calls[:first] if call.kind == "fsync"}
    synced = [call.path for call in calls[last:record] if call.kind == "fsync"]
    folders = [path for path in synced if not path.startswith(TMP)]
    assert sorted(folders) == sorted({str(folder) for name in window for folder in Path(name).parents})


def test_records_follow_their_files_and_the_manifest_is_last(memory: Path) -> None:
    names = [call.path for call in calls_of_a_write(memory / "store") if call.kind == "link"]
    for split, window in (("heldout", 0), ("train", 0), ("train", 1)):
        record = names.index(f"shards/{split}-{window:05d}.json")
        assert names.index(f"{split}/mlp.1/c/{window}/0") < record
        assert names.index(f"{split}/source/c/{window}") < record
    assert names.index("plan.json") < min(i for i, name in enumerate(names) if "train/" in name or "shards/" in name)
    assert names[-1] == "manifest.json"


@pytest.mark.kill
def test_two_writers_that_publish_everything_at_the_same_moment_agree(tmp_path: Path) -> None:
    write_three_windows(tmp_path / "alone")
    barrier = multiprocessing.get_context("forkserver").Barrier(2)
    root = tmp_path / "together"
    processes = [start(write_held_at_barrier, root, barrier) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert files(root) == files(tmp_path / "alone")


def test_two_sweeps_at_the_same_time_succeed(tmp_path: Path) -> None:
    """The folder may be removed between two calls of a sweep."""
    done = threading.Event()

    def create_and_sweep() -> None:
        while not done.is_set():
            (tmp_path / TMP).mkdir(exist_ok=True)
            sweep(tmp_path)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(create_and_sweep)
        try:
            for _ in range(3000):
                sweep(tmp_path)
        finally:
            done.set()
        other.result()


def has_only_whole_files(root: Path, expected: dict[str, bytes]) -> bool:
    return all(expected.get(name) == data for name, data in files(root).items())


def space_error(root: Path) -> str:
    """Write, and return the error if space ran out, or an empty text."""
    try:
        write_three_windows(root, threads=2)
    except SpaceError as error:
        return str(error)
    return ""


def test_a_limit_on_file_size_anywhere_fails_cleanly_and_the_same_call_completes(memory: Path) -> None:
    write_three_windows(memory / "alone")
    expected = files(memory / "alone")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    failed = 0
    for limit in sorted({len(data) - 1 for data in expected.values()}):
        root = memory / str(limit)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            said = space_error(root)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not said or f"No space left to write {root}" in said
        failed += bool(said)
        assert has_only_whole_files(root, expected)
        write_three_windows(root)
        assert files(root) == expected
    assert failed > 10


def mount(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs with a variable size. Skips if this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount(folder, "size=4k"):
        pytest.skip("mounting a tmpfs needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_at_any_page_fails_cleanly_and_the_same_call_completes(
    small_disk: Path, tmp_path: Path
) -> None:
    write_three_windows(tmp_path / "alone")
    expected = files(tmp_path / "alone")
    root, pages = small_disk / "store", 1
    while said := space_error(root):
        assert f"No space left to write {root}" in said
        assert has_only_whole_files(root, expected)
        pages += 1
        assert mount(small_disk, f"remount,size={4 * pages}k")
    assert pages > 20
    assert SpaceError.exit_code == 6
    sweep(root)
    assert files(root) == expected
    assert verify(open_store(root), deep=True) == []
