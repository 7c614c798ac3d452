"""Stores made to harm: strange bits come back as they are, everything else is one clear error, and nothing is written.

Whatever is in a folder, opening and reading it ends with rows or with a GsaeError: no other exception, no hang, no
file written, no memory beyond what the arrays are due.
"""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import crc32c
import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gsae.errors import CorruptError, GsaeError, IncompatibleError
from gsae.store import Store, describe, open_store, verify
from gsae.store.codec import planes
from gsae.store.format.manifest import Manifest, digest, files_digest
from gsae.store.format.plan import canonical_json, sha256
from gsae.store.write.window_writer import write_manifest
from gsae.tests.support.stores import make_store

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(
        tmp_path_factory.mktemp("hostile") / "store", contexts=40, window_rows=512, chunk_rows=128, sites={"mlp.1": 16}
    )


@pytest.fixture
def store(template: Store, tmp_path: Path) -> Store:
    return open_store(shutil.copytree(template.path, tmp_path / "store"))


def use(root: Path) -> Iterator[None]:
    """Do all that a user does with a store, one thing at a time; each may raise."""
    opened = open_store(root)
    yield from (None for _ in verify(opened, threads=1))
    describe(root)
    opened.tokens(), opened.split(), opened.documents()
    yield
    for site in opened.plan.sites:
        for split in ("train", "heldout"):
            each = opened.site(site.name, split)  # type: ignore[arg-type]
            with suppress(GsaeError), each.batches(64, threads=1, max_norm_multiple=10) as batches:
                next(batches, None)
            yield
            with suppress(GsaeError):
                next(each.in_order(), None)
            yield
    verify(opened, deep=True, threads=1)


def survives(root: Path) -> str:
    """Use a store; the GsaeError that ended it, if any, as text. Nothing may be written, anything else is a failure."""
    before = {path: os.lstat(path).st_mtime_ns for path in root.parent.rglob("*")}
    try:
        for _ in use(root):
            pass
    except GsaeError as error:
        told = str(error)
    else:
        told = ""
    assert {path: os.lstat(path).st_mtime_ns for path in root.parent.rglob("*")} == before
    assert len(told) < 1200
    assert all(c.isprintable() or c == "\n" for c in told)
    return told


# --- strange rows ---


PATTERNS = {"positive zero": 0x0000, "negative zero": 0x8000, "infinity": 0x7F80, "nan payloads": None}


def rows_of(pattern: str, n: int, d: int) -> np.ndarray:
    bits = PATTERNS[pattern]
    if bits is not None:
        return np.full((n, d), bits, np.uint16).view(ml_dtypes.bfloat16)
    payloads = np.concatenate([np.arange(0x7F81, 0x8000), np.arange(0xFF81, 0x10000)]).astype(np.uint16)
    return np.random.default_rng(0).choice(payloads, (n, d)).view(ml_dtypes.bfloat16)


READ_WITH_TENSORSTORE = """
import hashlib, sys, tensorstore as ts
x = ts.open({"driver": "zarr3", "kvstore": "file://" + sys.argv[1]}).result().read().result()
print(hashlib.sha256(x.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("codec", ["planes", "zstd"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_one_strange_value_return_their_bits_through_every_reader(
    tmp_path: Path, codec: str, pattern: str
) -> None:
    store = make_store(
        tmp_path / "store", contexts=60, codec=codec, chunk_rows=256, rows=lambda n, d: rows_of(pattern, n, d)
    )
    everywhere = rows_of(pattern, 60 * 32, 32).view(np.uint16)
    expected = []
    for source, x in store.site("mlp.1").in_order():
        expected.append(everywhere[source])
        assert np.array_equal(x.view(torch.int16).numpy().view(np.uint16), expected[-1])
    array = zarr.open(store.path, mode="r")["train/mlp.1"]
    assert isinstance(array, zarr.Array)
    assert np.array_equal(np.asarray(array[:]).view(np.uint16), np.concatenate(expected))
    if codec == "zstd":
        command = [sys.executable, "-c", READ_WITH_TENSORSTORE, f"{store.path}/train/mlp.1"]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        assert done.stdout.strip() == sha256(np.concatenate(expected).tobytes())
    assert verify(store, deep=True) == []
    assert survives(store.path) == ""


# --- files ---


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def exchanged(path: Path) -> None:
    """The file of another store, good in itself."""
    path.write_bytes(path.read_bytes()[::-1])


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def linked_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    "harm", [cut_short, emptied, exchanged, Path.unlink, made_a_folder, made_a_pipe, linked_to_itself]
)
def test_a_file_that_is_not_what_it_was_is_named_and_harms_nothing(store: Store, harm: Callable[[Path], None]) -> None:
    kinds = ["train/mlp.1/c/0/0", "heldout/source/c/0", "contexts/tokens/c/0/0", "documents/id/c/0",
             "shards/train-00000.json", "zarr.json", "plan.json"]  # fmt: skip
    for name in kinds:
        harm(store.path / name)
    told = "\n".join(verify(store, deep=True))
    assert all(f"{store.path}/{name}" in told for name in kinds)
    assert survives(store.path) != ""


def test_a_pipe_in_place_of_the_manifest_is_an_error_and_no_wait(store: Store) -> None:
    made_a_pipe(store.path / "manifest.json")
    with pytest.raises(GsaeError, match=r"manifest\.json"):
        open_store(store.path)


def test_a_folder_that_is_a_file_is_a_missing_file(store: Store) -> None:
    shutil.rmtree(store.path / "train/mlp.1/c")
    (store.path / "train/mlp.1/c").write_text("x")
    assert any("train/mlp.1/c/0/0 is missing" in fault for fault in verify(store))
    with pytest.raises(GsaeError, match=r"train/mlp\.1/c/0/0"):
        next(store.site("mlp.1").batches(10))
    with pytest.raises(GsaeError, match=r"train/mlp\.1/c/0/0"):
        next(store.site("mlp.1").in_order())


# --- manifests, plans and records ---


def sealed_again(body: dict[str, Any]) -> bytes:
    """A manifest's bytes with its three sums made right, as far as they can be: what a forger would publish."""
    with suppress(Exception):
        whole = Manifest.model_validate_json(json.dumps(body))
        body["digest"] = digest(whole.plan, list(whole.windows))
        body["files_digest"] = files_digest(whole.files, whole.windows)
    body.pop("sha256", None)
    return canonical_json(body | {"sha256": sha256(canonical_json(body))})


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as keys from the outside in."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in children:
        yield (*at, key)
        yield from places(inner, (*at, key))


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return copy


NASTY = st.sampled_from([
    None, True, 0, -1, 1, 2, 3, 2**16, 2**31, 2**52, 2**53, 2**60, 2**64, 10**4000, 1.5, 1e308, -0.0, "", "..", "../x",
    "/etc/passwd", "a/../../b", "\u0000", "\u001b[31m\n", "é", "x" * 5000, "none", "zstd", "planes", "float32", "AAAA",
    [], {}, [[]], [0], {"": 0}, "0" * 64,
])  # fmt: skip
JSON = st.recursive(
    NASTY | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_any_field_of_a_manifest_replaced_by_anything_is_an_error_or_harmless(
    store: Store, template: Store, data: st.DataObject, value: Any
) -> None:
    whole = json.loads((template.path / "manifest.json").read_bytes())
    every = list(places(whole))
    few = [at for at in every if at[0] == "plan"]  # what decides sizes, as often as all else
    at = data.draw(st.sampled_from(few) | st.sampled_from(every))
    (store.path / "manifest.json").write_bytes(sealed_again(put(whole, at, value)))
    tracemalloc.start()
    try:
        survives(store.path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON, name=st.sampled_from(["plan.json", "shards/train-00000.json"]))
def test_any_field_of_a_plan_or_record_likewise(
    store: Store, template: Store, data: st.DataObject, value: Any, name: str
) -> None:
    whole = json.loads((template.path / name).read_bytes())
    changed = put(whole, data.draw(st.sampled_from(list(places(whole)))), value)
    (store.path / name).write_bytes(canonical_json(changed))
    (store.path / "manifest.json").unlink(missing_ok=True)
    with suppress(GsaeError):
        describe(store.path)
    with pytest.raises(GsaeError):
        open_store(store.path)
    shutil.copy(template.path / "manifest.json", store.path)
    faults = verify(open_store(store.path), deep=True, threads=1)
    assert changed == whole or any(name in fault for fault in faults)
    shutil.copy(template.path / name, store.path / name)


def edited(template: Store, edit: Edit) -> bytes:
    body = json.loads((template.path / "manifest.json").read_bytes())
    edit(body)
    return sealed_again(body)


def one_window(body: dict[str, Any], rows: int) -> None:
    """All train rows in one window of absurdly many."""
    plan = body["plan"]
    plan |= {"rows": rows, "window_rows": rows, "requested_rows": None, "chunk_rows": 1 << 10}
    windows = {w["split"]: w for w in reversed(body["windows"])}
    windows["train"]["arrays"] = [a | {"rows": rows} for a in windows["train"]["arrays"]]
    body["windows"] = [windows["heldout"], windows["train"]]
    plan["heldout_rows"] = windows["heldout"]["arrays"][0]["rows"]
    for moments in body["moments"]["train"].values():
        moments["counts"] = [rows - len(moments["counts"]) + 1, *([1] * (len(moments["counts"]) - 1))]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m["files"][0].update(path="../../etc/passwd"), "leads out of the store"),
        (lambda m: m["plan"]["sites"][0].update(folder=".."), "reserved"),
        (lambda m: m["plan"]["sites"][0].update(folder="a/b"), "match pattern"),
        (lambda m: m["plan"]["sites"][0].update(name="\u001b[2J"), "match pattern"),
        (lambda m: m["plan"].update(rows=2**60), "less than"),
        (lambda m: m["plan"].update(rows=2**52), "windows are over"),
        (lambda m: m["plan"].update(rows=2**25), "does not list"),
        (lambda m: m["plan"].update(window_rows=2**50, chunk_rows=2**49), "a chunk of"),
        (lambda m: m["plan"].update(window_rows=2**50), "chunks is over"),
        (lambda m: m["plan"]["contexts"].update(contexts=2**52), "files that its plan has"),
        (lambda m: m["plan"]["contexts"].update(documents=2**52), "files that its plan has"),
        (lambda m: m["plan"]["tokenizer"].update(excluded_ids=[2**40]), "less than"),
        (lambda m: m["plan"].update(dropped_positions=[-1]), "greater than"),
        (lambda m: m["windows"].pop(), "does not list"),
        (lambda m: m["windows"][0]["arrays"].pop(), "arrays of its plan"),
        (lambda m: m["windows"][0]["arrays"][0].update(rows=1), "arrays of its plan"),
        (lambda m: m["windows"][0]["record"].update(path="plan.json"), "another record's name"),
        (lambda m: m["files"].pop(), "files that its plan has"),
        (lambda m: m["moments"]["train"].clear(), "moments of each site"),
        (lambda m: m.update(schema_version="2.0"), "format 2.0"),
        (lambda m: m.update(schema_version="9" * 5000 + ".0"), "no schema_version"),
        (lambda m: m.update(schema_version=[]), "no schema_version"),
    ],
)
def test_a_forged_manifest_is_refused_on_opening(store: Store, template: Store, edit: Edit, said: str) -> None:
    (store.path / "manifest.json").write_bytes(edited(template, edit))
    tracemalloc.start()
    with pytest.raises((CorruptError, IncompatibleError), match=said):
        open_store(store.path)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("bins", [10**4] * 3, "not ascending"),
        ("bins", [2**13, 2**13 + 1], "no rows have such moments"),
        ("counts", [0], "another number of rows"),
        ("sums", "not base64!", "not base64"),
        ("sums", "AAAA", "bytes"),
        ("squares", "infinite", "no rows have such moments"),
    ],
)
def test_forged_moments_are_an_error_when_they_are_used(
    store: Store, template: Store, field: str, value: Any, said: str
) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        moments = manifest["moments"]["train"]["mlp.1"]
        kept = len(moments["counts"])
        if field == "bins":
            moments["bins"] = value[:1] * kept if len(set(value)) == 1 else [value[0] + i for i in range(kept)]
        elif field == "counts":
            moments["counts"][0] += 1
        elif value == "infinite":
            moments[field] = "AAAAAAAA8H8A" * 0 + np_base64(np.full(kept * 16, np.inf))
        else:
            moments[field] = value

    (store.path / "manifest.json").write_bytes(edited(template, edit))
    with pytest.raises(CorruptError, match=said):
        open_store(store.path).site("mlp.1").batches(10)
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        describe(store.path)


def np_base64(values: np.ndarray) -> str:
    import base64

    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def test_a_window_of_more_rows_than_memory_is_an_error_before_anything_is_allocated(
    store: Store, template: Store
) -> None:
    (store.path / "manifest.json").write_bytes(edited(template, lambda m: one_window(m, 2**29)))
    opened = open_store(store.path)
    tracemalloc.start()
    for read in (lambda: next(opened.site("mlp.1").batches(10)), lambda: next(opened.site("mlp.1").in_order())):
        with pytest.raises(CorruptError, match="too few for its index"):
            read()
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        b'{"schema_version":"1.0","x":1e999}',
        b'{"schema_version":"1.0","x":NaN}',
        b'{"schema_version":"1.0","x":' + b"9" * 10_000 + b"}",
        b'{"schema_version":"1.0","schema_version":"1.0"}',
        '{"schema_version":"1.0"}'.encode("utf-16"),
        b'{"schema_version":"1.0","x":"\\ud800"}',
    ],
)
def test_what_is_no_manifest_is_one_short_error(store: Store, data: bytes) -> None:
    for name in ("manifest.json", "plan.json"):
        (store.path / name).write_bytes(data)
    assert "manifest.json" in survives(store.path)
    (store.path / "manifest.json").unlink()
    assert "plan.json" in survives(store.path)


# --- chunks ---


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
    """A planes chunk of 128 x 16 values, one block, whose nibbles are `frame`."""
    header = planes.HEADER.pack(b"GSP1", 0, 1, 0, 128, 16, 1024, 0)
    return header + bytes(16) + len(frame).to_bytes(4, "little") + bytes(8) + frame + bytes(128 * 16)


@pytest.mark.parametrize("codec", ["planes", "zstd"])
@pytest.mark.parametrize("frame", [DECLARES, DECLARES_NOTHING, HOLDS_LESS], ids=["declares", "silent", "less"])
def test_a_chunk_that_grows_to_gigabytes_is_refused_by_name_without_the_memory(
    tmp_path: Path, codec: str, frame: bytes
) -> None:
    made = make_store(tmp_path / "s", contexts=40, window_rows=512, chunk_rows=128, sites={"mlp.1": 16}, codec=codec)
    store = with_first_chunk(made, in_planes(frame) if codec == "planes" else frame)
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
