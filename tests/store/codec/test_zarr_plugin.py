"""Other readers: zarr-python with the two types of gsae registered, tensorstore without any code of gsae."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr

import gsae.store  # registers bfloat16 and gsae.planes
from gsae.store import Store
from gsae.tests.support.stores import make_store

assert gsae.store


def every_pattern(rows: int, d_in: int) -> np.ndarray:
    """Rows that hold all 65,536 bit patterns, NaN payloads and -0.0 included."""
    flat = np.resize(np.arange(1 << 16, dtype=np.uint16), rows * d_in)
    return np.random.default_rng(0).permutation(flat).reshape(rows, d_in).view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("codec", ["planes", "zstd", "none"])
def test_plain_zarr_walks_the_store_and_reads_the_same_bits_without_a_warning(tmp_path: Path, codec: str) -> None:
    store = make_store(tmp_path / "store", rows=every_pattern, codec=codec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open(store.path, mode="r")
        assert isinstance(group, zarr.Group)
        names = {name for name, _ in group.members(max_depth=None)}
        assert {"contexts/tokens", "documents/start", "train/mlp.1", "heldout/source"} <= names
        values = np.asarray(group["train/mlp.1"][:])
        source = np.asarray(group["train/source"][:])
    assert values.dtype == ml_dtypes.bfloat16
    assert np.array_equal(values.view(np.uint16), every_pattern(140 * 32, 32)[source].view(np.uint16))
    assert np.array_equal(np.asarray(group["contexts/tokens"][:]), store.tokens())
    assert len(np.unique(values.view(np.uint16))) > 60_000


def test_part_of_an_array_can_be_read(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", chunk_rows=64, window_rows=512)
    array = zarr.open(store.path, mode="r")["train/mlp.1"]
    assert isinstance(array, zarr.Array)
    whole = np.asarray(array[:])
    assert np.array_equal(np.asarray(array[500:600, 3:7]).view(np.uint16), whole[500:600, 3:7].view(np.uint16))


def test_an_unwritten_window_reads_as_nan_never_as_zeros(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    (store.path / "train/mlp.1/c/1/0").unlink()
    array = zarr.open(store.path, mode="r")["train/mlp.1"]
    assert isinstance(array, zarr.Array)
    assert np.isnan(np.asarray(array[1024:2048]).astype(np.float32)).all()


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_tensorstore_reads_standard_codecs_without_gsae(tmp_path: Path, codec: str) -> None:
    store = make_store(tmp_path / "store", rows=every_pattern, codec=codec)
    script = (
        "import json, sys, hashlib, tensorstore as ts\n"
        "open_ = lambda a: ts.open({'driver': 'zarr3', 'kvstore': 'file://' + sys.argv[1] + '/' + a}).result()\n"
        "x = open_('train/mlp.1').read().result()\n"
        "assert not any(m.startswith(('gsae', 'zarr')) for m in sys.modules)\n"
        "print(json.dumps([str(x.dtype), x.shape, hashlib.sha256(x.tobytes()).hexdigest()]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(store.path)], capture_output=True, check=True, text=True)
    dtype, shape, digest = json.loads(done.stdout)
    assert dtype == "bfloat16"
    assert tuple(shape) == (store.plan.rows, 32)
    assert digest == raw_sha256(store)


def raw_sha256(store: Store) -> str:
    import hashlib

    rows = [x.view(torch.int16).numpy().tobytes() for _, x in store.site("mlp.1").in_order()]
    return hashlib.sha256(b"".join(rows)).hexdigest()


def test_zarr_can_write_the_types_of_gsae(tmp_path: Path) -> None:
    from gsae.store.codec.zarr_plugin import PlanesCodec

    rows = every_pattern(100, 24)
    how = {"dtype": "bfloat16", "serializer": PlanesCodec(level=0), "compressors": None}
    array = zarr.create_array(tmp_path / "a.zarr", shape=rows.shape, chunks=(64, 24), **how)
    array[:] = rows
    again = zarr.open_array(tmp_path / "a.zarr", mode="r")
    assert np.array_equal(np.asarray(again[:]).view(np.uint16), rows.view(np.uint16))
