"""Does a write that is killed 40 times at random moments end in the bytes of one that never was?

A producer makes rows from the sources alone and hands window after window to a background thread that writes it, as a
harvest does with its model; each process is killed by SIGKILL somewhere on its way and the next one goes on. On a real
disk by default, with every fsync.
"""

import argparse
import json
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gsae.files import sweep
from gsae.store import is_complete, open_store, verify
from gsae.store.write.contexts_writer import write_contexts
from gsae.store.write.window_writer import unfinished, write_manifest, write_plan, write_window
from gsae.tests.support.children import files, finish, killed_at_random
from gsae.tests.support.stores import make_plan, random_contexts, sources_of

SITES = {"mlp.10": 576, "resid.10": 576}
CONTEXTS, CONTEXT_SIZE, WINDOW_ROWS = 700, 128, 2048
KILLS, SPARE = 40, 5  # a process may have ended by the time it is killed


def made(source: NDArray[np.int64], d_in: int, scale: float) -> NDArray[np.uint16]:
    """Return bfloat16 bits (rows, d_in) that follow from each row's source."""
    phase = source[:, None] * np.linspace(0.1, 1.7, d_in)
    return (scale * np.sin(phase)).astype(ml_dtypes.bfloat16).view(np.uint16)


def write(root: Path) -> None:
    """Write the store, or go on with it."""
    if is_complete(root):
        sweep(root)
        return
    sweep(root)
    arrays = random_contexts(CONTEXTS, CONTEXT_SIZE)
    plan = make_plan(write_contexts(root, arrays, ended_early=False), arrays, SITES, window_rows=WINDOW_ROWS)
    write_plan(root, plan)
    due = set(unfinished(root, plan))
    with ThreadPoolExecutor(1) as background:
        writing: list[Future[None]] = []
        for split, window, source in sources_of(plan, arrays):
            if (split, window) in due:
                rows = {name: made(source, d_in, 1.0 + i) for i, (name, d_in) in enumerate(SITES.items())}
                for future in writing:
                    future.result()
                writing = [background.submit(write_window, root, plan, split, window, rows, source)]
        for future in writing:
            future.result()
    write_manifest(root, plan)
    sweep(root)


def main() -> int:
    """Print the verdict; return 0 when the bytes are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=KILLS, help="how many processes must be found alive and killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the folder to write under; a temporary one by default")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="gsae-crash-", dir=options.out))
    try:
        started = time.perf_counter()
        finish(write, root / "undisturbed")
        undisturbed = time.perf_counter() - started
        expected = files(root / "undisturbed")
        killed = killed_at_random(
            write, (root / "killed",), root / "killed", len(expected), options.kills + SPARE, options.seed
        )
        found = files(root / "killed")
        faults = verify(open_store(root / "killed"), deep=True)
    finally:
        shutil.rmtree(root)
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    figures = {
        "kills": killed,
        "files": len(expected),
        "megabytes": round(sum(map(len, expected.values())) / 1e6, 1),
        "files_differing": len(differing),
        "faults": len(faults),
        "undisturbed_seconds": round(undisturbed, 2),
        "seconds": round(time.perf_counter() - started, 2),
    }
    met = killed >= options.kills and not differing and not faults
    print(json.dumps({"bench": "crash", "met": met, **figures}))
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
