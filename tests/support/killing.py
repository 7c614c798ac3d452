"""A write of three windows, in steps that processes of their own are killed in, held in, or run out of space in."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gsae.files import sweep
from gsae.store.format.manifest import all_windows
from gsae.store.write.contexts_writer import write_contexts
from gsae.store.write.window_writer import read_plan, unfinished, write_manifest, write_plan, write_window
from gsae.tests.support.calls import Call, kill_at, recorded, watched
from gsae.tests.support.children import files, start
from gsae.tests.support.stores import make_plan, normal_rows, random_contexts, sources_of

Step = Callable[[Path], None]
CONTEXTS, CONTEXT_SIZE, D_IN = 30, 16, 8


def write_three_windows(root: Path, threads: int = 1) -> None:
    """Write a store of a held-out and two train windows, or go on with it, as a harvest does."""
    begin(root)
    write_windows(root, threads)


def begin(root: Path) -> None:
    """Write tokens and plan."""
    sweep(root)
    arrays = random_contexts(CONTEXTS, CONTEXT_SIZE)
    spec = write_contexts(root, arrays, ended_early=False)
    write_plan(root, make_plan(spec, arrays, {"mlp.1": D_IN}, window_rows=256, chunk_rows=64))
    sweep(root)


def write_windows(root: Path, threads: int = 1, again: bool = False) -> None:
    """Write the windows that are not finished (again: all), then the manifest."""
    sweep(root)
    _write_windows(root, again=again, threads=threads)
    plan = read_plan(root)
    assert plan is not None
    write_manifest(root, plan)
    sweep(root)


def _write_windows(root: Path, without: int | None = None, again: bool = False, threads: int = 1) -> None:
    plan = read_plan(root)
    assert plan is not None
    due = all_windows(plan) if again else unfinished(root, plan)
    x = normal_rows(CONTEXTS * CONTEXT_SIZE, D_IN)
    for split, window, source in sources_of(plan, random_contexts(CONTEXTS, CONTEXT_SIZE)):
        if (split, window) in due and (split, window) != ("train", without):
            write_window(root, plan, split, window, {"mlp.1": x[source]}, source, threads)


def stop_in_a_window(root: Path) -> None:
    """Write all but train window 0, of which a site's file is there without the rest."""
    begin(root)
    _write_windows(root)
    (root / "shards/train-00000.json").unlink()
    (root / "train/source/c/0").unlink()


def killed_everywhere(before: Step | None, step: Step, folder: Path, side: int) -> None:
    """Kill `step` before (side 0) or after (side 1) its calls, run it again, and compare with a whole run.

    The moment after a call is that before the next one, so each side takes every other call, and the two together
    every moment once. before: makes what the step finds. The number of calls, and what went wrong, are written to
    `folder/found.json`.
    """
    base, root = folder / "base", folder / "store"
    base.mkdir()
    if before:
        before(base)

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root, copy_function=os.link)  # the store never changes a file, so links do

    fresh()
    calls = recorded(root, lambda: step(root))
    expected = files(root)
    faults = []
    for number, call in enumerate(calls):
        if number % 2 and not (side and number == len(calls) - 1):
            continue
        fresh()
        child = os.fork()
        if not child:
            kill_at(root, 2 * number + side, lambda: step(root))
            os._exit(0)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            faults.append(f"call {number} was not reached")
        step(root)
        if files(root) != expected:
            faults.append(f"killed {'after' if side else 'before'} {call}, it ends in other files")
    (folder / "found.json").write_text(json.dumps({"calls": len(calls), "faults": faults}))


def assert_survives_every_kill(before: Step | None, step: Step, memory: Path, calls: int) -> None:
    """Check that `step`, of more than `calls` calls, ends in the same files wherever it was killed.

    Two processes fork the ones that are killed: one at moments before a call, one at moments after a call.
    """
    sides = [memory / "before", memory / "after"]
    for folder in sides:
        folder.mkdir()
    processes = [start(killed_everywhere, before, step, folder, side) for side, folder in enumerate(sides)]
    for process in processes:
        process.join()
    for folder in sides:
        found = json.loads((folder / "found.json").read_text())
        assert found["faults"] == []
        assert found["calls"] > calls


def write_held_at_barrier(root: Path, barrier: Any) -> None:
    """Write every window, waiting before each publication until the other writer is about to publish too."""

    def hold(call: Call) -> None:
        if call.kind == "link":
            barrier.wait(30)

    with watched(root, hold, lambda call: None):
        begin(root)
        write_windows(root, threads=2, again=True)
