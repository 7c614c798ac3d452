"""docs/format.md as a program: an independent reader that needs only JSON, arrays, sha256 and zstd.

It shares no code with gsae and decodes every byte of a store for each codec. It must find the rows that were written,
in the order that the page derives from plan and tokens, with the sums that the page defines.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zstandard

from gsae.store.codec.planes import encode
from gsae.tests.support.stores import make_store, normal_rows

PAGE = (Path(__file__).parents[3] / "docs" / "format.md").read_text()


# --- the reader ---


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC = crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def without_crc(data: bytes) -> bytes:
    assert crc32c(data[:-4]) == int.from_bytes(data[-4:], "little")
    return data[:-4]


def unzstd(frame: bytes, size: int) -> bytes:
    assert zstandard.get_frame_parameters(frame).content_size == size
    return zstandard.ZstdDecompressor().decompress(frame)


def unplanes(data: bytes) -> np.ndarray:
    """Decode a chunk to bit patterns (rows, channels)."""
    assert data[:4] == b"GSP1"
    form, packing = data[4], data[5]
    assert data[6:8] == b"\0\0"
    rows, channels, block_rows, exceptions = np.frombuffer(data[8:24], "<u4").tolist()
    at = 24

    def take(kind: str, count: int) -> np.ndarray:
        nonlocal at
        size = np.dtype(kind).itemsize * count
        at += size
        return np.frombuffer(data[at - size : at], kind)

    blocks = -(-rows // block_rows)
    base = take("u1", channels)
    packed_size = take("<u4", blocks).tolist()
    exception_start = take("<u4", blocks + 1).tolist()
    position, exponent = take("<u4", exceptions), take("u1", exceptions)
    assert exception_start[0] == 0
    assert exception_start[-1] == exceptions
    half = (channels + 1) // 2
    e = np.empty((rows, channels), np.uint8)
    for b, size in enumerate(packed_size):
        first, last = b * block_rows, min((b + 1) * block_rows, rows)
        width = half if form == 0 else channels
        block = take("u1", size).tobytes()
        if packing == 1:
            block = unzstd(block, (last - first) * width)
        content = np.frombuffer(block, np.uint8).reshape(last - first, width)
        if form == 1:
            e[first:last] = content
            continue
        e[first:last] = np.concatenate([content & 15, content >> 4], axis=1)[:, :channels] + base
        inside = position[exception_start[b] : exception_start[b + 1]]
        assert all(first * channels <= p < last * channels for p in inside.tolist())
    e.reshape(-1)[position] = exponent
    low = take("u1", rows * channels).reshape(rows, channels).astype(np.uint16)
    assert at == len(data)
    return (low >> 7) << 15 | e.astype(np.uint16) << 7 | (low & 127)


ITEM = {"bfloat16": "<u2", "float16": "<u2", "float32": "<u4", "int64": "<i8", "int32": "<i4", "uint8": "u1"}
FILL = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000, "int64": 0, "int32": 0, "uint8": 0}


def read_shard(data: bytes, kind: str, width: int, rows: int, count: int, chunk_rows: int, codec: str) -> np.ndarray:
    """Return the rows (rows, width) of a shard file of `count` chunks as integers; checks filling and absent chunks."""
    index = np.frombuffer(without_crc(data[-(16 * count + 4) :]), "<u8").reshape(count, 2).tolist()
    present = -(-rows // chunk_rows)
    assert index[present:] == [[2**64 - 1] * 2] * (count - present)
    found = []
    for offset, size in index[:present]:
        chunk = without_crc(data[offset : offset + size])
        if codec == "planes":
            found.append(unplanes(chunk))
            continue
        raw = chunk if codec == "none" else unzstd(chunk, chunk_rows * width * np.dtype(ITEM[kind]).itemsize)
        found.append(np.frombuffer(raw, ITEM[kind]).reshape(chunk_rows, width))
    whole = np.concatenate(found)
    assert (whole[rows:] == FILL[kind]).all()
    return whole[:rows]


class PlainStore:
    """A store read by the page alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        data = (root / "manifest.json").read_bytes()
        self.manifest = json.loads(data)
        assert canonical(self.manifest) == data
        self.plan = self.manifest["plan"]
        self.entries = {f["path"]: f for f in self.every_file()}

    def every_file(self) -> list[dict[str, Any]]:
        m = self.manifest
        shards = [a["file"] for w in m["windows"] for a in w["arrays"]]
        return [*m["files"], *shards, *(w["record"] for w in m["windows"])]

    def small(self, name: str, kind: str, *shape: int) -> np.ndarray:
        """Return an array of `contexts/` or `documents/`."""
        rows, width = shape[0], int(np.prod(shape[1:], dtype=int))
        row_bytes = width * np.dtype(ITEM[kind]).itemsize
        chunk_rows = 1
        while 2 * chunk_rows * row_bytes <= 2**20:
            chunk_rows *= 2
        parts = []
        for shard, first in enumerate(range(0, rows, 64 * chunk_rows)):
            data = (self.root / name / "c" / "/".join([str(shard), *("0" for _ in shape[1:])])).read_bytes()
            here = min(rows - first, 64 * chunk_rows)
            parts.append(read_shard(data, kind, width, here, 64, chunk_rows, "zstd"))
        return np.concatenate(parts).reshape(shape)

    def window(self, split: str, array: str, number: int) -> np.ndarray:
        """Return a window of a site (by folder) or of `source`, (rows, width), as integers."""
        p, source = self.plan, array == "source"
        total = p["rows" if split == "train" else "heldout_rows"]
        rows = min(p["window_rows"], total - number * p["window_rows"])
        width = 1 if source else next(s["d_in"] for s in p["sites"] if s["folder"] == array)
        kind = "int64" if source else p["model"]["dtype"]
        codec = "zstd" if source and p["codec"] == "planes" else p["codec"]
        data = (self.root / split / array / "c" / (str(number) if source else f"{number}/0")).read_bytes()
        return read_shard(data, kind, width, rows, p["window_rows"] // p["chunk_rows"], p["chunk_rows"], codec)

    def tokens(self) -> np.ndarray:
        c = self.plan["contexts"]
        return self.small("contexts/tokens", "int32", c["contexts"], c["context_size"])

    def splits(self) -> np.ndarray:
        return self.small("contexts/split", "uint8", self.plan["contexts"]["contexts"])

    def documents(self) -> list[np.ndarray]:
        n = self.plan["contexts"]["documents"]
        kinds = {"start": "int64", "id": "int64", "split": "uint8"}
        return [self.small(f"documents/{name}", kind, n) for name, kind in kinds.items()]

    def windows(self, split: str) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Yield each window's entry and the sources that the plan dictates for it."""
        p, tokens = self.plan, self.tokens()
        row = ~np.isin(tokens, p["tokenizer"]["excluded_ids"])
        row[:, p["dropped_positions"]] = False
        number = ("train", "heldout").index(split)
        mine = np.flatnonzero(self.splits() == number)
        laid = mine[permutation(len(mine), p["seed"], 2 + number, 0)]
        every = np.concatenate([c * tokens.shape[1] + np.flatnonzero(row[c]) for c in laid])
        every = every[: p["rows"] if split == "train" else None]
        for entry in self.manifest["windows"]:
            if entry["split"] == split:
                w = entry["window"]
                inside = every[w * p["window_rows"] : (w + 1) * p["window_rows"]]
                yield entry, inside[permutation(len(inside), p["seed"], 4 + number, w)]


def permutation(n: int, seed: int, stream: int, index: int) -> np.ndarray:
    philox = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=np.array([0, 0, index, 0], np.uint64))
    return np.argsort(philox.random_raw(n), kind="stable")


# --- what it finds ---


def odd_rows(rows: int, d_in: int) -> np.ndarray:
    """Rows with exceptions of every kind: zeros, infinities, NaN payloads, far exponents."""
    x = normal_rows(rows, d_in).view(np.uint16)
    rng = np.random.default_rng(2)
    some = rng.random(x.shape) < 0.003
    x[some] = rng.integers(0, 1 << 16, some.sum())
    return x.view(ml_dtypes.bfloat16)


def noise(rows: int, d_in: int) -> np.ndarray:
    """Rows that no nibble holds."""
    return np.random.default_rng(3).integers(0, 1 << 16, (rows, d_in)).astype(np.uint16).view(ml_dtypes.bfloat16)


def floats(rows: int, d_in: int) -> np.ndarray:
    return normal_rows(rows, d_in).astype(np.float32) * np.float32(1.1)


KINDS: dict[str, dict[str, Any]] = {
    "planes level 1": {"codec": "planes", "level": 1, "rows": odd_rows},
    "planes level 0": {"codec": "planes", "level": 0, "rows": odd_rows},
    "planes of noise": {"codec": "planes", "level": 1, "rows": noise},
    "zstd": {"codec": "zstd", "rows": odd_rows},
    "none": {"codec": "none", "rows": odd_rows},
    "zstd of float32": {"codec": "zstd", "dtype": "float32", "rows": floats},
}
SITES = {"mlp.1": 21, "attn.0": 8}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PlainStore, dict[str, Any]]:
    kind = KINDS[request.param]
    root = tmp_path_factory.mktemp("format") / "store"
    make_store(root, contexts=75, sites=SITES, window_rows=512, chunk_rows=128, dropped_positions=(1, 7), **kind)
    return PlainStore(root), kind


def test_every_row_is_there_in_the_order_that_plan_and_tokens_give(made: tuple[PlainStore, dict[str, Any]]) -> None:
    store, kind = made
    everywhere = {name: kind["rows"](75 * 32, d_in) for name, d_in in SITES.items()}
    seen = []
    for split in ("heldout", "train"):
        for entry, due in store.windows(split):
            source = store.window(split, "source", entry["window"])[:, 0]
            assert np.array_equal(source, due)
            for name, x in everywhere.items():
                bits = store.window(split, name, entry["window"])
                assert np.array_equal(bits, x[source].view(bits.dtype))
            seen += source.tolist()
    tokens = store.tokens()
    assert len(set(seen)) == len(seen) == store.plan["rows"] + store.plan["heldout_rows"]
    assert not np.isin(tokens.reshape(-1)[seen], store.plan["tokenizer"]["excluded_ids"]).any()
    assert set(np.array(seen) % 32).isdisjoint({1, 7})


def test_every_sum_is_the_one_that_the_page_defines(made: tuple[PlainStore, dict[str, Any]]) -> None:
    store, _ = made
    m, plan = store.manifest, store.plan
    for path, entry in store.entries.items():
        data = (store.root / path).read_bytes()
        assert (len(data), sha256(data)) == (entry["size"], entry["sha256"])
        if path.endswith(".json"):
            assert canonical(json.loads(data)) == data
    there = {str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()}
    assert there == {"manifest.json", *store.entries}
    assert [f["path"] for f in m["files"]] == sorted(f["path"] for f in m["files"])
    assert json.loads((store.root / "plan.json").read_bytes()) == plan
    meaning = {name: value for name, value in plan.items() if name not in ("codec", "level", "versions")}
    rows = [[a["array"], w["window"], a["raw_sha256"]] for w in m["windows"] for a in w["arrays"]]
    assert sha256(canonical({"plan": meaning, "rows": rows})) == m["digest"]
    assert sha256(canonical(store.every_file())) == m["files_digest"]
    assert sha256(canonical({name: value for name, value in m.items() if name != "sha256"})) == m["sha256"]
    for window in m["windows"]:
        for array in window["arrays"]:
            raw = store.window(*array["array"].split("/"), window["window"])
            assert (len(raw), sha256(raw.tobytes())) == (array["rows"], array["raw_sha256"])
    contexts = plan["contexts"]
    assert sha256(store.tokens().tobytes()) == contexts["tokens_sha256"]
    assert sha256(store.splits().tobytes()) == contexts["split_sha256"]
    assert sha256(b"".join(a.tobytes() for a in store.documents())) == contexts["documents_sha256"]


def test_records_agree_with_the_manifest_and_hold_the_moments(made: tuple[PlainStore, dict[str, Any]]) -> None:
    store, _ = made
    order = [("heldout", w) for w in range(9)] + [("train", w) for w in range(9)]
    listed = [(w["split"], w["window"]) for w in store.manifest["windows"]]
    assert listed == [window for window in order if window in listed]
    totals: dict[tuple[str, str], int] = {}
    for window in store.manifest["windows"]:
        record = json.loads((store.root / window["record"]["path"]).read_bytes())
        assert window["record"]["path"] == f"shards/{window['split']}-{window['window']:05d}.json"
        assert {name: record[name] for name in ("split", "window", "arrays")} == {
            name: window[name] for name in ("split", "window", "arrays")
        }
        for site in store.plan["sites"]:
            x = values(store.window(window["split"], site["folder"], window["window"]), store.plan["model"]["dtype"])
            assert_moments_of_rows(record["moments"][site["name"]], x)
            at = (window["split"], site["name"])
            totals[at] = totals.get(at, 0) + sum(record["moments"][site["name"]]["counts"])
    for (split, site), count in totals.items():
        assert sum(store.manifest["moments"][split][site]["counts"]) == count


def values(bits: np.ndarray, dtype: str) -> np.ndarray:
    wide = bits.astype(np.uint32) << 16 if dtype == "bfloat16" else bits
    with np.errstate(invalid="ignore"):  # signalling NaN
        return wide.view(np.float32).astype(np.float64)


def assert_moments_of_rows(moments: dict[str, Any], x: np.ndarray) -> None:
    finite = np.isfinite(x).all(axis=1)
    assert moments["non_finite"] == (~finite).sum()
    x = x[finite]
    norms = (x * x).sum(axis=1)
    bins = np.array([-16384 if n == 0 else np.floor(8 * np.log2(n)) for n in norms], np.int64)
    assert moments["bins"] == sorted(set(bins.tolist()))
    for name, power in (("sums", 1), ("squares", 2)):
        table = np.frombuffer(base64.b64decode(moments[name]), "<f8").reshape(len(moments["bins"]), -1)
        for number, count, total in zip(moments["bins"], moments["counts"], table, strict=True):
            inside = x[bins == number]
            assert len(inside) == count
            most = np.sqrt(count * (inside**2).sum(axis=0)) if power == 1 else (inside**2).sum(axis=0)
            assert (np.abs((inside**power).sum(axis=0) - total) <= 1e-9 * most).all()


def test_zarr_metadata_is_as_on_the_page(made: tuple[PlainStore, dict[str, Any]]) -> None:
    store, kind = made
    root = json.loads((store.root / "zarr.json").read_bytes())
    nodes = root["consolidated_metadata"]["metadata"]
    for path, node in nodes.items():
        assert json.loads((store.root / path / "zarr.json").read_bytes()) == node
    arrays = {path: node for path, node in nodes.items() if node["node_type"] == "array"}
    assert set(nodes) - set(arrays) == {"contexts", "documents", "heldout", "train"}
    site = arrays["train/mlp.1"]
    sharding = site["codecs"][0]["configuration"]
    assert site["shape"] == [store.plan["rows"], 21]
    assert site["data_type"] == store.plan["model"]["dtype"]
    assert site["chunk_grid"]["configuration"]["chunk_shape"] == [512, 21]
    assert sharding["chunk_shape"] == [128, 21]
    assert sharding["index_location"] == "end"
    expected = {"planes": ["gsae.planes", "crc32c"], "zstd": ["bytes", "zstd", "crc32c"], "none": ["bytes", "crc32c"]}
    assert [codec["name"] for codec in sharding["codecs"]] == expected[kind["codec"]]


def test_the_page_names_every_field(made: tuple[PlainStore, dict[str, Any]]) -> None:
    store, _ = made
    record = json.loads((store.root / store.manifest["windows"][0]["record"]["path"]).read_bytes())
    fields = {*store.manifest, *store.plan, *record, *record["arrays"][0], *record["arrays"][0]["file"],
              *store.plan["sites"][0], *record["moments"]["mlp.1"]}  # fmt: skip
    fields |= {f for part in ("model", "tokenizer", "dataset", "contexts") for f in store.plan[part]}
    assert [field for field in sorted(fields) if f"`{field}`" not in PAGE] == []


@pytest.mark.parametrize("level", [0, 1])
def test_a_chunk_of_several_blocks_is_read_by_the_page(level: int) -> None:
    x = odd_rows(700, 1025).view(np.uint16)
    data = encode(x, level)
    rows, block_rows = int.from_bytes(data[8:12], "little"), int.from_bytes(data[16:20], "little")
    assert (rows > block_rows) == (level == 1)
    assert np.array_equal(unplanes(data), x)


def test_philox_is_counted_as_the_page_says() -> None:
    """The first eight words, from the algorithm's definition."""

    def block(counter: list[int], key: list[int]) -> list[int]:
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * counter[2], 2**64)
            counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
            key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
        return counter

    words = [*block([1, 0, 7, 0], [5, 4]), *block([2, 0, 7, 0], [5, 4])]
    assert permutation(8, 5, 4, 7).tolist() == sorted(range(8), key=words.__getitem__)
