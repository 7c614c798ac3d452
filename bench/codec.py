"""How near is `gsae.planes` to the entropy limit and to memory speed, next to the codecs that one would take instead?

Run as `.venv/bin/python bench/codec.py [--store STORE] [--site SITE,SITE]`. Without a store, three sites of SmolLM2 are
harvested from packages (a minute), or, where these are not installed, rows are made up. One thread; all codecs take
turns in one process and medians of CPU time are compared. MB/s are of raw bfloat16.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import blosc, zstd
from numpy.typing import NDArray

from gsae.store import open_store
from gsae.store.codec import planes
from gsae.store.codec.scatter import empty_rows, scatter

SITES = "mlp.10,attn.10,resid.15"
CHUNKS, ROUNDS = 8, 9
LARGE_BYTES, LARGE_ROUNDS = 256 << 20, 5
WIDTHS = (256, 4096, 8192)

WITHIN_LIMIT, LEVEL_0_RATIO = 1.015, 0.77
DECODE_TIMES, ENCODE_TIMES, LARGE_TIMES = 5.0, 1.0, 2.0

U16 = NDArray[np.uint16]


@dataclass(frozen=True)
class Contender:
    """A codec for chunks (rows, channels) of bfloat16 bits: encode(x) -> chunk, decode(chunk, out)."""

    name: str
    encode: Callable[[U16], Any]
    decode: Callable[[Any, U16], Any]


def main() -> int:
    """Print one JSON line a site and codec, and the verdict; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="a store of bfloat16 activations")
    parser.add_argument("--site", default=SITES, help=f"sites of it (default {SITES})")
    options = parser.parse_args()
    blosc.use_threads = False
    contenders = [*standard(), *pcodec(), *(ours(level) for level in (0, 1))]
    with tempfile.TemporaryDirectory() as folder:
        real, sites = rows_of_sites(options.store, options.site.split(","), Path(folder))
    verdicts = []
    for site, chunks in sites.items():
        figures = measure(site, chunks, contenders)
        verdicts.append(verdict(site, figures, limits(np.concatenate(chunks)), beyond_the_caches(site, chunks)))
    for width in WIDTHS:
        measure(f"made-up.{width}", made_up(width, CHUNKS), [c for c in contenders if c.name != "pcodec"])
    met = all(v["met"] for v in verdicts)
    say(bench="codec", met=met, real_activations=real, sites={v.pop("site"): v for v in verdicts})
    return 0 if met else 1


def say(**figures: Any) -> None:
    rounded = json.loads(json.dumps(figures), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    print(json.dumps(rounded), flush=True)


# -- the codecs


def standard() -> list[Contender]:
    """Return memcpy, Blosc and zstd, each as one would use it on this data."""
    return [
        Contender("memcpy", lambda x: x.copy(), lambda chunk, out: np.copyto(out, chunk)),
        Contender("blosc-lz4-bitshuffle", lambda x: blosc.compress(x, b"lz4", 5, blosc.BITSHUFFLE), blosc.decompress),
        Contender("blosc-zstd-1-shuffle", lambda x: blosc.compress(x, b"zstd", 1, blosc.SHUFFLE), blosc.decompress),
        Contender("zstd-1", lambda x: zstd.compress(x, 1), zstd.decompress),
    ]


def pcodec() -> list[Contender]:
    """Return pcodec where it is installed (`pip install pcodec`)."""
    try:
        from numcodecs.pcodec import PCodec

        codec = PCodec()
        return [Contender("pcodec", codec.encode, codec.decode)]
    except ImportError:
        say(codec="pcodec", installed=False)
        return []


def ours(level: int) -> Contender:
    """Return `gsae.planes` at one of its levels, rows decoded in order."""

    def decode(chunk: bytes, out: U16) -> None:
        planes.decode_into(chunk, out, np.arange(len(out)))

    return Contender(f"planes-{level}", lambda x: planes.encode(x, level), decode)


# -- the rows


def rows_of_sites(store: Path | None, names: list[str], work: Path) -> tuple[bool, dict[str, list[U16]]]:
    """Return whether the rows are real, and CHUNKS chunks of each site."""
    if store is None and harvested(work / "store"):
        store = work / "store"
    if store is None:
        return False, {f"made-up.{width}": made_up(width, CHUNKS) for width in (576, 768, 2048)}
    opened = open_store(store)
    return True, {name: chunks_of(opened.site(name), opened.plan.chunk_rows) for name in names}


def harvested(out: Path) -> bool:
    """Harvest SITES of SmolLM2 on a text that comes with Python; False when the LM is not installed."""
    command = [sys.executable, "-m", "gsae.cli", "harvest", "--model", "builtin:smollm2-135m", "--out", str(out)]
    settings = {"--dataset": "builtin:pydoc", "--site": SITES, "--rows": "16384", "--window-rows": "16384"}
    more = {"--context-size": "256", "--device": "cpu", "--batch-size": "8"}
    options = [word for pair in (settings | more).items() for word in pair]
    return subprocess.run([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def chunks_of(site: Any, chunk_rows: int) -> list[U16]:
    """Return the first CHUNKS whole chunks of a site, as bits."""
    rows = (x for _, x in itertools.islice(site.in_order(chunk_rows), CHUNKS))
    return [x.view(torch.int16).numpy().view(np.uint16) for x in rows if len(x) == chunk_rows]


def made_up(width: int, count: int) -> list[U16]:
    """Return chunks of about 2 MiB of normal rows with channels of differing scale and mean, rows of differing norm."""
    rng = np.random.default_rng(width)
    scale, mean = np.exp(rng.standard_normal((2, width)))
    rows = max((2 << 20) // (2 * width), 1)
    chunks = []
    for _ in range(count):
        x = (rng.standard_normal((rows, width)) + 0.3 * mean) * scale * np.exp(0.3 * rng.standard_normal((rows, 1)))
        chunks.append((x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    return chunks


# -- the limits


def entropy(counts: NDArray[Any]) -> float:
    """Return the bits a value of an ideal order-0 code for values that occur so often."""
    share = counts[counts > 0] / counts.sum()
    return float(-np.sum(share * np.log2(share)))


def limits(x: U16) -> dict[str, float]:
    """Return order-0 limits as shares of raw; sign and mantissa (a byte) stay as they are."""
    exponents = (x >> 7).astype(np.uint8)
    medians = np.sort(exponents, axis=0)[len(x) // 2]
    bits = {
        "one_table": entropy(np.bincount(exponents.ravel())),
        "table_per_channel": float(np.mean([entropy(np.bincount(column)) for column in exponents.T])),
        "minus_channel_median": entropy(np.bincount((exponents - medians).ravel())),
    }
    return {name: (8 + of_exponent) / 16 for name, of_exponent in bits.items()}


# -- the measurements


def cpu_seconds(work: Callable[[], Any]) -> float:
    before = time.thread_time()
    work()
    return time.thread_time() - before


def medians(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Let all take turns, once to warm up and `rounds` times more; return the median CPU seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            seconds[name].append(cpu_seconds(run))
    return {name: statistics.median(all_but_first[1:]) for name, all_but_first in seconds.items()}


def measure(site: str, chunks: list[U16], contenders: list[Contender]) -> dict[str, dict[str, float]]:
    """Encode and decode the chunks, one after the other, into one reused array; print and return the figures."""
    raw = sum(x.nbytes for x in chunks)
    out = empty_rows(*chunks[0].shape, np.uint16)
    encoded = {c.name: [c.encode(x) for x in chunks] for c in contenders}
    for c in contenders:
        c.decode(encoded[c.name][-1], out)
        assert np.array_equal(out, chunks[-1]), c.name

    def encode(c: Contender) -> None:
        for x in chunks:
            c.encode(x)

    def decode(c: Contender) -> None:
        for chunk in encoded[c.name]:
            c.decode(chunk, out)

    encoding = medians({c.name: lambda c=c: encode(c) for c in contenders}, ROUNDS)
    decoding = medians({c.name: lambda c=c: decode(c) for c in contenders}, ROUNDS)
    figures = {
        c.name: {
            "ratio": sum(memoryview(chunk).nbytes for chunk in encoded[c.name]) / raw,
            "encode_MB_s": raw / encoding[c.name] / 1e6,
            "decode_MB_s": raw / decoding[c.name] / 1e6,
        }
        for c in contenders
    }
    for name, found in figures.items():
        say(site=site, shape=list(chunks[0].shape), codec=name, **found)
    return figures


def beyond_the_caches(site: str, chunks: list[U16]) -> dict[str, float]:
    """Decode LARGE_BYTES to places of their own; return MB/s, in order and to shuffled places.

    The limit of level 0: an ordinary copy moves three bytes for each (read, read of the line written to, write), a
    decoder that streams moves 1.75. Blosc cannot scatter, so it decodes in order and numpy scatters, chunk by chunk.
    """
    rows, width = chunks[0].shape
    count = max(LARGE_BYTES // chunks[0].nbytes, 1)
    every = [chunks[i % len(chunks)] for i in range(count)]
    out, one = empty_rows(count * rows, width, np.uint16), empty_rows(rows, width, np.uint16)
    out[:] = 0
    parts = [slice(i * rows, (i + 1) * rows) for i in range(count)]
    in_order = np.arange(count * rows)
    shuffled = np.random.default_rng(0).permutation(count * rows)
    raw = [x.copy() for x in every]
    lz4 = [bytes(standard()[1].encode(x)) for x in every]
    level = [[planes.encode(x, n) for x in every] for n in (0, 1)]

    def copies() -> None:
        for part, x in zip(parts, raw, strict=True):
            out[part] = x

    def blosc_lz4() -> None:
        for part, chunk in zip(parts, lz4, strict=True):
            blosc.decompress(chunk, out[part])

    def blosc_lz4_scattered() -> None:
        for part, chunk in zip(parts, lz4, strict=True):
            blosc.decompress(chunk, one)
            out[shuffled[part]] = one

    def decode(encoded: list[bytes], places: NDArray[np.int64]) -> None:
        for part, chunk in zip(parts, encoded, strict=True):
            planes.decode_into(chunk, out, places[part])

    def copy_scattered() -> None:
        for part, x in zip(parts, raw, strict=True):
            scatter(x, out, shuffled[part])

    seconds = medians(
        {
            "memcpy": copies,
            "blosc-lz4-bitshuffle": blosc_lz4,
            "planes-0": lambda: decode(level[0], in_order),
            "planes-1": lambda: decode(level[1], in_order),
            "shuffled raw": copy_scattered,
            "shuffled blosc-lz4-bitshuffle": blosc_lz4_scattered,
            "shuffled planes-0": lambda: decode(level[0], shuffled),
            "shuffled planes-1": lambda: decode(level[1], shuffled),
        },
        LARGE_ROUNDS,
    )
    found = {name: out.nbytes / of_one / 1e6 for name, of_one in seconds.items()}
    say(site=site, decoded_bytes=out.nbytes, level_0_limit_MB_s=found["memcpy"] * 3 / 1.75, decode_MB_s=found)
    return found


def verdict(
    site: str, figures: dict[str, dict[str, float]], limit: dict[str, float], large: dict[str, float]
) -> dict[str, Any]:
    """Print the limits and compare with what is wanted."""
    say(site=site, limits=limit)
    none, packed, peer = figures["planes-0"], figures["planes-1"], figures["blosc-zstd-1-shuffle"]
    found = {
        "over_limit": packed["ratio"] / limit["minus_channel_median"],
        "decode_over_blosc_zstd": packed["decode_MB_s"] / peer["decode_MB_s"],
        "encode_over_blosc_zstd": packed["encode_MB_s"] / peer["encode_MB_s"],
        "level_0_ratio": none["ratio"],
        "level_0_over_blosc_lz4": large["planes-0"] / large["blosc-lz4-bitshuffle"],
        "level_0_over_blosc_lz4_shuffled": large["shuffled planes-0"] / large["shuffled blosc-lz4-bitshuffle"],
    }
    met = (
        found["over_limit"] <= WITHIN_LIMIT
        and found["decode_over_blosc_zstd"] >= DECODE_TIMES
        and found["encode_over_blosc_zstd"] >= ENCODE_TIMES
        and found["level_0_ratio"] <= LEVEL_0_RATIO
        and found["level_0_over_blosc_lz4"] >= LARGE_TIMES
    )
    return {"site": site, "met": met, **found}


if __name__ == "__main__":
    sys.exit(main())
