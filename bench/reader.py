"""How fast are rows read from a store, how long does a consumer wait for them, and what memory does it take?

Run as `.venv/bin/python bench/reader.py [--store STORE --site SITE]` after `make bench-peers`; without a store it makes
one of about 600 MB. Checksums are on. One and two threads mean one and two cores: each part runs in a process that may
use no more, with all that it compares interleaved in it, and SAELens in the peers' environment on the same cores.

Compared are `batches(4096)`, shuffled, in its stride (buffers once used); the bare decoder: the same chunks in stored
order, each into one buffer a thread that stays in the cache, crc32c checked; zarr-python's default pipeline over an
array of equal chunks under Blosc (zstd-1, shuffle), read in order, eight chunks a call; SAELens's cached path with
mixing on, a buffer of two batches (the least work for it), the faster of float32 and float16.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

PEER = Path(".venv-peers/bin/python")
BATCH, MIX = 4096, 32
ROUNDS, SHARE, PHASE = 7, 0.8, 1.0
CONTEXTS, CONTEXT_SIZE, D_IN = 840, 512, 768
PEER_ROWS, PEER_CONTEXT, PEER_DTYPES, HOOK = 1 << 17, 128, ("float32", "float16"), "hook"
TARGETS = {"of_decoder": 0.75, "over_zarr": 4.0, "over_saelens": 3.0, "cold_of_pread": 0.9}
MOST_WAITING, MOST_SLOWER = 0.05, 1.1
READ_BYTES, SHORT_BYTES, LONG_BYTES = 8 << 20, 1 << 29, 6 << 30
CONSTANT_BYTES = 48 << 20


def main() -> int:
    """Print one JSON line a measurement and the verdict; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="a store to read, in place of one made here")
    parser.add_argument("--site", help="its site; the first one when left out")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        from peers.saelens_reader import saelens

        return saelens(options.peer, options.threads)
    if options.part is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        for line in PARTS[options.part](options):
            print(json.dumps(line), flush=True)
        return 0
    if not PEER.exists():
        parser.error(f"{PEER} is not there. Run `make bench-peers` first, from the repository root.")
    with tempfile.TemporaryDirectory() as folder:
        options.work = Path(folder)
        prepare(options)
        lines = [line for part, threads in RUNS for line in run_part(options, part, threads)]
    return verdict(lines)


def verdict(lines: list[dict[str, Any]]) -> int:
    """Print the last line: the worst of each figure, and whether all targets are met."""
    figures = {name: min(line[name] for line in lines if name in line) for name in TARGETS}
    waits = max(line["waiting"] for line in lines if "waiting" in line)
    memory = next(line for line in lines if line["what"] == "memory")
    met = (
        all(figures[name] >= least for name, least in TARGETS.items())
        and waits <= MOST_WAITING
        and memory["bytes"] <= memory["bound"]
        and memory["slower"] <= MOST_SLOWER
    )
    rest = {"waiting": waits, "memory_of_bound": memory["bytes"] / memory["bound"], "slower": memory["slower"]}
    print(json.dumps({"bench": "reader", "met": met, **rounded(figures | rest), "targets": TARGETS}))
    return 0 if met else 1


# -- what is read


def prepare(options: argparse.Namespace) -> None:
    """Make the store if none is given, and the same rows for zarr and SAELens."""
    import torch
    import zarr
    from zarr.codecs import BloscCodec

    from gsae.store import open_store
    from gsae.tests.support.stores import make_store

    if options.store is None:
        sizes = {"contexts": CONTEXTS, "context_size": CONTEXT_SIZE, "window_rows": 1 << 15}
        options.store = make_store(options.work / "store", sites={"mlp.10": D_IN}, rows=some_rows, **sizes).path
    store = open_store(options.store)
    options.site = options.site or store.plan.sites[0].name
    site = store.site(options.site)
    rows = site[:].view(torch.int16).numpy().view(np.uint16)
    chunks = (store.plan.chunk_rows, site.d_in)
    codec = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")
    array = zarr.create_array(options.work / "zarr", shape=rows.shape, chunks=chunks, dtype="uint16", compressors=codec)
    array[:] = rows
    np.save(options.work / "rows.npy", rows[: min(len(rows), PEER_ROWS) // PEER_CONTEXT * PEER_CONTEXT])


def some_rows(rows: int, d_in: int) -> NDArray[Any]:
    """Make bfloat16 rows (rows, d_in) like a language model's: uneven channels, a few very large, rows of all sizes."""
    import ml_dtypes

    draw = np.random.default_rng(0)
    channels = np.exp(0.7 * draw.standard_normal(d_in)).astype(np.float32)
    channels[:: d_in // 4] *= 30
    made = np.empty((rows, d_in), ml_dtypes.bfloat16)
    for first in range(0, rows, 1 << 16):
        part = made[first : first + (1 << 16)]
        size = np.exp(0.3 * draw.standard_normal((len(part), 1), np.float32))
        part[:] = draw.standard_normal(part.shape, np.float32) * size * channels
    return made


def run_part(options: argparse.Namespace, part: str, threads: int) -> Iterator[dict[str, Any]]:
    """Run a part in a process of its own, on `threads` cores, and yield its lines as they come."""
    command = [sys.executable, __file__, "--part", part, "--threads", str(threads), "--rounds", str(options.rounds)]
    command += ["--store", str(options.store), "--site", options.site, "--work", str(options.work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            yield json.loads(line)
    if process.returncode:
        raise SystemExit(f"The part {part!r} on {threads} threads failed.")


def opened(options: argparse.Namespace) -> Any:
    """Return the site that is measured."""
    from gsae.store import open_store

    return open_store(options.store).site(options.site)


# -- warm: rows a second


def warm(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the reader, the bare decoder, zarr and SAELens in turn."""
    site, threads = opened(options), options.threads
    import torch

    torch.set_num_threads(threads)
    with site.batches(BATCH, threads=threads, epochs=None, mix=MIX) as batches, Peer(options) as peer:
        rates: dict[str, Callable[[], float]] = {
            "reader": lambda: reader_rate(site, batches),
            "decoder": lambda: decoder_rate(site, threads),
            "zarr": zarr_rate(options.work / "zarr", threads),
            **{f"saelens_{dtype}": lambda dtype=dtype: peer.rate(dtype) for dtype in PEER_DTYPES},
        }
        found: dict[str, list[float]] = {name: [] for name in rates}
        for number in range(options.rounds + 1):  # the first only warms up
            for name, rate in rates.items():
                measured = rate()
                found[name] += [measured] * (number > 0)
    middle = {name: median(values) for name, values in found.items()}
    yield {
        "what": "warm",
        "threads": threads,
        "rows_per_second": {name: round(value) for name, value in middle.items()},
        "gb_per_second": rounded({name: value * site.d_in * 2 / 1e9 for name, value in middle.items()}),
        **rounded(
            {
                "of_decoder": middle["reader"] / middle["decoder"],
                "over_zarr": middle["reader"] / middle["zarr"],
                "over_saelens": middle["reader"] / max(middle[f"saelens_{dtype}"] for dtype in PEER_DTYPES),
            }
        ),
    }


def reader_rate(site: Any, batches: Iterator[Any]) -> float:
    """Time as many rows as the site has, after those that were read ahead."""
    for _ in range(2 * MIX * site.store.plan.chunk_rows // BATCH + 4):
        next(batches)
    rows, started = 0, time.perf_counter()
    while rows < site.rows:
        rows += len(next(batches))
    return rows / (time.perf_counter() - started)


def decoder_rate(site: Any, threads: int) -> float:
    """Time the decoding of every full chunk in stored order, each thread into one buffer."""
    spec, store = site.store.array(site.spec, site.split), site.store
    shards = [store.shard(spec, window) for window in store.windows(site.split)]
    work = [(s, c) for s in shards for c in range(s.chunks) if s.rows_of_chunk(c) == spec.chunk_rows]
    places, mine = np.arange(spec.chunk_rows), threading.local()

    def decode(item: tuple[Any, int]) -> None:
        if not hasattr(mine, "buffer"):
            mine.buffer = np.zeros((spec.chunk_rows, spec.width), np.uint16)
        item[0].decode_into(item[1], mine.buffer, places)

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(decode, work))
        seconds = time.perf_counter() - started
    for shard in shards:
        shard.close()
    return len(work) * spec.chunk_rows / seconds


def zarr_rate(path: Path, threads: int) -> Callable[[], float]:
    """Return the timing of one pass over the zarr array, eight chunks a call."""
    import zarr

    zarr.config.set({"threading.max_workers": threads})
    array = zarr.open_array(path, mode="r")
    step = 8 * array.chunks[0]

    def rate() -> float:
        started = time.perf_counter()
        for first in range(0, array.shape[0], step):
            array[first : first + step]
        return float(array.shape[0] / (time.perf_counter() - started))

    return rate


# -- a consumer that sleeps


def waiting(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure how long a consumer waits that takes SHARE of the bare decoder's rate."""
    site, threads = opened(options), options.threads
    shares = []
    with site.batches(BATCH, threads=threads, epochs=None, mix=MIX) as batches:
        for number in range(options.rounds + 1):  # the first only warms up; the machine's speed changes in between
            pause = BATCH / (SHARE * decoder_rate(site, threads))
            shares += [waited(batches, pause)] * (number > 0)
    yield {"what": "waiting", "threads": threads, **rounded({"waiting": median(shares)})}


def waited(stream: Any, pause: float) -> float:
    """Take batches for PHASE seconds, sleeping after each; return the share of time spent waiting."""
    before, started = stream.wait_seconds, time.perf_counter()
    for _ in range(round(PHASE / pause)):
        next(stream)
        time.sleep(pause)
    return float((stream.wait_seconds - before) / (time.perf_counter() - started))


# -- cold


def cold(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure groups of an epoch with nothing in the page cache, against pread of the same files in turn.

    The files are dropped from it when an epoch begins. Two groups had been asked for by then, and two are when the
    last counted batch comes, so neither they nor the two before the epoch's end are counted.
    """
    site = opened(options)
    spec = site.store.array(site.spec, site.split)
    files = [options.store / spec.file(window) for window in site.store.windows(site.split)]
    size = sum(path.stat().st_size for path in files)
    groups = -(-sum(file.chunks for file in site.store.files(site.name, site.split, "mmap")) // MIX)
    found: dict[str, list[float]] = {"pread": [], "reader": []}
    with site.batches(BATCH, threads=options.threads, epochs=None, mix=MIX) as batches:
        for epoch in range(1, 2 * options.rounds + 1):
            forget(files)
            started = time.perf_counter()
            for path in files:
                read_through(path)
            found["pread"].append(size / (time.perf_counter() - started))
            read_until(batches, epoch, 0)
            forget(files)
            read_until(batches, epoch, 2)
            started = time.perf_counter()
            rows = read_until(batches, epoch, groups - 3)
            found["reader"].append(rows / site.rows * size / (time.perf_counter() - started))
    middle = {name: median(values) for name, values in found.items()}
    yield {
        "what": "cold",
        "threads": options.threads,
        **rounded({"cold_of_pread": middle["reader"] / middle["pread"]}),
        **rounded({f"{name}_gb_per_second": value / 1e9 for name, value in middle.items()}),
    }


def read_until(batches: Any, epoch: int, group: int) -> int:
    """Take batches to the first one that ends in that group, and return their rows."""
    rows, state = 0, batches.state_dict()
    while (state["epoch"], state["group"]) < (epoch, group):
        rows += len(next(batches))
        state = batches.state_dict()
    return rows


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_through(path: Path) -> None:
    """Read a file with pread into one buffer."""
    buffer, fd, at = bytearray(READ_BYTES), os.open(path, os.O_RDONLY), 0
    while got := os.preadv(fd, [buffer], at):
        at += got
    os.close(fd)


# -- memory


def memory(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure memory beyond the maps of files while reading 6 GiB, and whether rows come slower than in 0.5 GiB."""
    site = opened(options)
    chunk = site.store.plan.chunk_rows * site.d_in * 2
    next(site.batches(BATCH, mix=1))  # compiles
    before, most = private_bytes(), 0
    rows = rows_short = 0
    with site.batches(BATCH, threads=options.threads, epochs=None, mix=MIX) as batches:
        for _ in range(2 * MIX * chunk // (BATCH * site.d_in * 2) + 4):
            next(batches)
        started = time.perf_counter()
        while rows * site.d_in * 2 < LONG_BYTES:
            rows += len(next(batches))
            most = max(most, private_bytes())
            if not rows_short and rows * site.d_in * 2 >= SHORT_BYTES:
                rows_short, short = rows, time.perf_counter() - started
        seconds = time.perf_counter() - started
    bound = 2 * MIX * chunk + 3 * BATCH * site.d_in * 2 + CONSTANT_BYTES
    slower = (seconds / rows) / (short / rows_short)
    yield {
        "what": "memory",
        "bytes": most - before,
        "bound": bound,
        "constant": CONSTANT_BYTES,
        **rounded({"slower": slower}),
    }


def private_bytes() -> int:
    """Return this process's memory that is no map of a file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem")) << 10


# -- in the peers' environment


class Peer:
    """A process of the peers' environment that measures SAELens when it is asked."""

    def __init__(self, options: argparse.Namespace) -> None:
        command = [str(PEER), __file__, "--peer", str(options.work), "--threads", str(options.threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process: Any = subprocess.Popen(command, text=True, **pipes)

    def rate(self, dtype: str) -> float:
        """Return rows a second of one pass over its cache in `dtype`."""
        print(dtype, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """Round to four digits."""
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "warm": warm, "waiting": waiting, "cold": cold, "memory": memory
}  # fmt: skip
RUNS = (("warm", 1), ("warm", 2), ("waiting", 2), ("cold", 2), ("memory", 2))

if __name__ == "__main__":
    sys.exit(main())
