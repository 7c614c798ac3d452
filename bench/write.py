"""How fast is the writer? Raw GB/s a core of `write_window`, without a language model, to memory.

Two sites of d = 4096 in bfloat16, channels of differing scale and rows of differing norm, at 1 and 2 threads. What one
core needs for each part alone, on the same rows in the same run, is the limit that the whole is held against. Scatter
is the harvest's own: batches of rows to their places in the window's buffer, before the window is written.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gsae.store import Plan, empty_rows, scatter
from gsae.store.format import row_order as order
from gsae.store.format.arrays import site_array
from gsae.store.format.moments import Moments
from gsae.store.write.contexts_writer import write_contexts
from gsae.store.write.window_writer import write_plan, write_window
from gsae.tests.support.stores import make_plan, random_contexts

SITES = ("mlp.10", "resid.10")
BATCH_ROWS = 2048
NEEDED = 0.35  # raw GB/s a core
Rows = dict[str, NDArray[np.uint16]]


def activations(rows: int, d_in: int, seed: int) -> NDArray[np.uint16]:
    """Return bfloat16 bits (rows, d_in): normal, channels and rows each with their own scale."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal(d_in)).astype(np.float32)
    out = np.empty((rows, d_in), np.uint16)
    for first in range(0, rows, 1024):
        part = out[first : first + 1024]
        norms = np.exp(0.15 * rng.standard_normal((len(part), 1))).astype(np.float32)
        values = rng.standard_normal(part.shape, dtype=np.float32) * scale * norms
        part[:] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return out


def begin(root: Path, rows: int, d_in: int) -> Plan:
    """Write tokens and plan of a store with room for many windows."""
    arrays = random_contexts(64, 32)
    spec = write_contexts(root, arrays, ended_early=False)
    widths = dict.fromkeys(SITES, d_in)
    plan = make_plan(spec, arrays, widths, window_rows=rows, rows=1000 * rows, heldout_rows=0)
    write_plan(root, plan)
    return plan


def placed(laid: Rows, places: NDArray[np.int64]) -> Rows:
    """Put laid rows batch by batch to their stored places, as the harvest does."""
    buffers = {name: empty_rows(*x.shape, np.uint16) for name, x in laid.items()}
    for first in range(0, len(places), BATCH_ROWS):
        for name, x in laid.items():
            scatter(x[first : first + BATCH_ROWS], buffers[name], places[first : first + BATCH_ROWS])
    return buffers


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the CPU time of `work`: of this thread alone."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def parts(root: Path, plan: Plan, rows: NDArray[np.uint16]) -> dict[str, float]:
    """Return the seconds of one core for each part of writing one raw GB."""
    spec = site_array(plan, "train", SITES[0])
    chunks = [rows[i : i + spec.chunk_rows] for i in range(0, len(rows), spec.chunk_rows)]
    encoded = [b"".join(spec.encode(chunk)) for chunk in chunks]

    def write() -> None:
        with (root / "bare").open("wb") as file:
            for chunk in encoded:
                file.write(chunk)
        (root / "bare").unlink()

    work: dict[str, Callable[[], Any]] = {
        "sha256 of rows": lambda: [hashlib.sha256(chunk.data) for chunk in chunks],
        "sha256 of file": lambda: [hashlib.sha256(chunk) for chunk in encoded],
        "crc32c": lambda: [crc32c.crc32c(chunk) for chunk in encoded],
        "write": write,
        "moments": lambda: Moments.of(rows, "bfloat16"),
        "encode and crc32c": lambda: [spec.encode(chunk) for chunk in chunks],
    }
    return {name: statistics.median(cpu_seconds(f) for _ in range(3)) * 1e9 / rows.nbytes for name, f in work.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1 << 15, help="rows of a window")
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("/dev/shm"), help="where to write; a tmpfs")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="gsae-write-", dir=options.out))
    try:
        measure(root, options.rows, options.d_in, options.rounds)
    finally:
        shutil.rmtree(root)


def measure(root: Path, rows: int, d_in: int, rounds: int) -> None:
    """Time windows at 1 and 2 threads in turn, with and without the scatter."""
    plan = begin(root, rows, d_in)
    laid = {name: activations(rows, d_in, seed) for seed, name in enumerate(SITES)}
    raw = sum(x.nbytes for x in laid.values())
    seconds = parts(root, plan, laid[SITES[0]][:8192])
    limit = 1 / sum(s for name, s in seconds.items() if name != "crc32c")
    print(json.dumps({"part": "one core, each alone, seconds a raw GB", **rounded(seconds), "GB/s": round(limit, 3)}))
    places = order.permutation(rows, 0, order.Stream.TRAIN_ROWS)
    source = np.arange(rows, dtype=np.int64)
    found: dict[tuple[int, str], list[float]] = {}
    used: dict[int, list[float]] = {}
    for number in range(-1, rounds):  # the first one loads what is compiled
        for threads in (1, 2):
            started = time.perf_counter()
            stored = placed(laid, places)
            scattered, before = time.perf_counter(), time.process_time()
            write_window(root, plan, "train", number + 1, stored, source, threads)
            written, after = time.perf_counter(), time.process_time()
            del stored
            size = sum(path.stat().st_size for path in (root / "train").rglob("*") if path.is_file())
            shutil.rmtree(root / "train")
            shutil.rmtree(root / "shards")
            if number >= 0:
                used.setdefault(threads, []).append(raw / (after - before) / 1e9)
                found.setdefault((threads, "write"), []).append(raw / (written - scattered) / threads / 1e9)
                found.setdefault((threads, "scatter and write"), []).append(raw / (written - started) / threads / 1e9)
    rates = {key: statistics.median(values) for key, values in found.items()}
    for (threads, what), rate in rates.items():
        spread = [round(min(found[threads, what]), 3), round(max(found[threads, what]), 3)]
        line = {"what": what, "threads": threads, "raw GB/s a core": round(rate, 3), "from to": spread}
        print(json.dumps(line | {"of the limit": round(rate / limit, 3)}))
    figures = {
        "raw_gb_per_s_per_core": {str(t): round(rates[t, "write"], 3) for t in (1, 2)},
        "raw_gb_per_cpu_second": {str(t): round(statistics.median(used[t]), 3) for t in (1, 2)},
        "with_scatter": {str(t): round(rates[t, "scatter and write"], 3) for t in (1, 2)},
        "needed": NEEDED,
        "ratio_to_raw": round(size / raw, 4),
        "rows": rows,
        "d_in": d_in,
        "load": round(os.getloadavg()[0], 2),
    }
    print(json.dumps({"bench": "write", "met": min(rates.values()) >= NEEDED, **figures}))


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Return the values with three digits after the point."""
    return {name: round(value, 3) for name, value in values.items()}


if __name__ == "__main__":
    main()
