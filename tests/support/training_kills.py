"""Training runs that are killed: each attempt in a process forked from one that has the imports done and no thread.

behind: training goes on while a checkpoint is written, as on a GPU.
"""

import json
import os
import random
import shutil
import signal
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gsae.errors import InterruptedRun
from gsae.store import open_store
from gsae.tests.support.calls import Call, kill_at, watched
from gsae.tests.support.children import files
from gsae.train import Event, Progress, RunConfig, parse_sae, train
from gsae.train.run import checkpoint_writer
from gsae.train.run.checkpoint import load_checkpoint

SAES = parse_sae("gated width=16 l1=.1,3") + parse_sae("relu width=16 l1=3")


def config(**settings: Any) -> RunConfig:
    """A run of two groups that resamples in its middle."""
    usual = {"site": "mlp.1", "steps": 4, "batch_size": 32, "log_every": 1, "threads": 1, "device": "cpu", "saes": SAES,
             "resample_at": (2,), "resample_silent_rows": 1, "resample_warm_up_steps": 2, "eval_every": 3,
             "eval_rows": 16, "checkpoint_every": 2,
             "lr": 0.3, "lr_warm_up_steps": 0, "l1_warm_up_steps": 0, "on_divergence": "retry"}  # fmt: skip
    return RunConfig(**(usual | settings))


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; return its wait status. A clean stop of a run ends it with its exit code."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except InterruptedRun as stop:
            code = stop.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def kept(out: Path) -> dict[str, bytes]:
    """What a run leaves, without its settings, in which how often to save may differ."""
    return {name: data for name, data in files(out).items() if name != "config.toml" and not name.endswith(".tmp")}


def resampled(out: Path) -> int:
    """How many SAEs of a run were given new directions."""
    states = [load_checkpoint(folder, only=("resampled",)) for folder in sorted((out / "state").iterdir())]
    return sum(int((state.tensors["resampled"] >= 0).sum()) for state in states if state is not None)


def train_into(store: Path, settings: dict[str, Any], listen: Callable[[Event], None], out: Path) -> None:
    """Train or resume."""
    train(open_store(store).site("mlp.1"), config(**settings), out, listen)


def nothing(event: Any) -> None:
    """Ignore an event."""


def set_behind(behind: bool) -> None:
    """Decide for this process and those it forks whether training goes on while a checkpoint is written."""
    checkpoint_writer.writes_behind = lambda device: behind


def around_every_write(store: Path, folder: Path, first: int, behind: bool) -> None:
    """Kill a run before each call that changes its folder (which is after the one before it), and resume it.

    first: 0 or 1, for every other call, so that two processes share the work. The result is written to found.json.
    Behind, the number of calls varies a little: how many lines a merge finds depends on which thread is faster.
    """
    set_behind(behind)
    whole, out, faults, missed = folder / "whole", folder / "run", [], 0
    # The bank that needs no compiled code, which every forked process would have to load.
    run = partial(train_into, store, {"clip_grad_norm": 1e9, "saes": SAES[1:], "lr": 0.5}, nothing)
    with open_store(store).site("mlp.1").batches(32) as batches:
        next(batches)

    def count() -> None:
        threads: list[str] = []

        def note(call: Call) -> None:
            threads.append(threading.current_thread().name)

        with watched(whole, note, lambda call: None):
            run(whole)
        own = sum(name.startswith("gsae-checkpoint") for name in threads)
        (folder / "calls.json").write_text(json.dumps({"calls": len(threads), "of_the_writer": own}))

    assert in_child(count) == 0
    expected, counted = kept(whole), json.loads((folder / "calls.json").read_text())
    for number in range(first, counted["calls"], 2):
        shutil.rmtree(out, ignore_errors=True)
        missed += not os.WIFSIGNALED(in_child(partial(kill_at, out, 2 * number, partial(run, out))))
        if in_child(partial(run, out)):
            faults.append(f"killed at call {number}, it does not resume")
        if kept(out) != expected:
            faults.append(f"killed at call {number}, it ends in other files")
    found = counted | {"faults": faults, "missed": missed, "resampled": resampled(whole)}
    (folder / "found.json").write_text(json.dumps(found))


def at_random(store: Path, folder: Path, kills: int, behind: bool) -> None:
    """Stop runs that save every 1, 7 and 100 steps at random moments, by SIGKILL and SIGTERM; compare their ends."""
    set_behind(behind)
    draw, faults, found = random.Random(5), [], 0
    settings: dict[str, Any] = {"steps": 120, "resample_at": (40, 90), "on_divergence": "continue"}
    assert in_child(partial(train_into, store, settings | {"checkpoint_every": 100}, nothing, folder / "whole")) == 0
    expected = kept(folder / "whole")
    for every in (1, 7, 100):
        out, own = folder / f"every-{every}", settings | {"checkpoint_every": every}
        for _ in range(kills):
            stop = Stopping(draw.choice([signal.SIGKILL, signal.SIGTERM]), draw.randrange(1, 24), draw.random() * 0.01)
            status = in_child(partial(train_into, store, own, stop, out))
            found += os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 143
        if in_child(partial(train_into, store, own, nothing, out)):
            faults.append(f"with a checkpoint every {every} steps it does not resume")
        if kept(out) != expected:
            faults.append(f"with a checkpoint every {every} steps it ends in other files")
    (folder / "found.json").write_text(
        json.dumps({"found": found, "faults": faults, "resampled": resampled(folder / "whole")})
    )


class Stopping:
    """A listener that signals its process so many steps after it began, and a little later: at any moment of a step."""

    def __init__(self, number: int, steps: int, seconds: float) -> None:
        self.number, self.left, self.seconds = number, steps, seconds

    def __call__(self, event: Event) -> None:
        self.left -= isinstance(event, Progress)
        if not self.left:
            threading.Timer(self.seconds, os.kill, (os.getpid(), self.number)).start()
