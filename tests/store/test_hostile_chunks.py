"""Forged chunks in an otherwise good store: refused by name, without the memory that they ask for."""

import json
import tracemalloc
from pathlib import Path

import crc32c
import numpy as np
import pytest
import zstandard

from gsae.errors import CorruptError
from gsae.store import Store, open_store, verify
from gsae.store.codec import planes
from gsae.store.format.json_files import canonical_json, sha256
from gsae.store.write.window_writer import write_manifest
from gsae.tests.support.stores import make_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return made(tmp_path / "store", "planes")


def made(root: Path, codec: str) -> Store:
    return make_store(root, contexts=40, window_rows=512, chunk_rows=128, sites={"mlp.1": 16}, codec=codec)


def with_first_chunk(store: Store, body: bytes) -> Store:
    """The store, every sum right, with another first chunk in the first train window."""
    path = store.path / "train/mlp.1/c/0/0"
    data = path.read_bytes()
    tail = 16 * 4 + 4
    index = np.frombuffer(data[-tail:-4], "<u8").reshape(4, 2).copy()
    chunk = body + crc32c.crc32c(body).to_bytes(4, "little")
    data = data[:-tail] + chunk
    index[0] = len(data) - len(chunk), len(chunk)
    data += index.tobytes() + crc32c.crc32c(index.tobytes()).to_bytes(4, "little")
    path.write_bytes(data)
    record = store.path / "shards/train-00000.json"
    fields = json.loads(record.read_bytes())
    fields["arrays"][0]["file"] |= {"size": len(data), "sha256": sha256(data)}
    record.write_bytes(canonical_json(fields))
    (store.path / "manifest.json").unlink()
    write_manifest(store.path, store.plan)
    return open_store(store.path)


DECLARES = zstandard.ZstdCompressor().compress(bytes(1 << 28))
DECLARES_NOTHING = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 28))
HOLDS_LESS = zstandard.ZstdCompressor().compress(bytes(100))


def in_planes(frame: bytes) -> bytes:
    """Return a planes chunk of 128 x 16 values, one block, with the nibbles in `frame`."""
    header = planes.HEADER.pack(b"GSP1", 0, 1, 0, 128, 16, 1024, 0)
    return header + bytes(16) + len(frame).to_bytes(4, "little") + bytes(8) + frame + bytes(128 * 16)


@pytest.mark.parametrize("codec", ["planes", "zstd"])
@pytest.mark.parametrize("frame", [DECLARES, DECLARES_NOTHING, HOLDS_LESS], ids=["declares", "silent", "less"])
def test_a_chunk_that_grows_to_gigabytes_is_refused_by_name_without_the_memory(
    tmp_path: Path, codec: str, frame: bytes
) -> None:
    chunk = in_planes(frame) if codec == "planes" else frame
    store = with_first_chunk(made(tmp_path / "s", codec), chunk)
    tracemalloc.start()
    for read in (lambda: list(store.site("mlp.1").batches(10)), lambda: list(store.site("mlp.1").in_order())):
        with pytest.raises(CorruptError, match=r"train/mlp\.1/c/0/0: chunk 0: "):
            read()
    faults = verify(store, deep=True)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    assert any("train/mlp.1/c/0/0: chunk 0: " in fault for fault in faults)


def test_the_forged_chunk_would_be_read_if_it_were_good(store: Store) -> None:
    nibbles = zstandard.ZstdCompressor().compress(bytes(128 * 8))
    good = with_first_chunk(store, in_planes(nibbles))
    _, rows = next(good.site("mlp.1").in_order())
    assert not rows[:128].any()
    assert rows[128:].any()
