"""Hostile stores: unusual bits are read unchanged, everything else is one clear error, and no file is written.

For any content of a folder, opening and reading it ends with rows or with a GsaeError: no other exception, no hang, no
file written, no memory beyond that of the arrays.
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

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gsae.errors import CorruptError, GsaeError, IncompatibleError
from gsae.store import Store, describe, open_store, verify
from gsae.store.format.json_files import canonical_json, sha256
from gsae.store.format.manifest import Manifest, digest, files_digest
from gsae.tests.support.selection import mostly_slow
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
    """Do everything that a user does with a store, step by step; each step may raise."""
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


def assert_harmless(root: Path) -> str:
    """Use a store and check that it writes nothing and raises GsaeError only; return the text of the error, or ''."""
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


def strange_rows(pattern: str, n: int, d: int) -> np.ndarray:
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


@pytest.mark.parametrize("codec", mostly_slow(["planes", "zstd"], "planes"))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_one_strange_value_return_their_bits_through_every_reader(
    tmp_path: Path, codec: str, pattern: str
) -> None:
    store = make_store(
        tmp_path / "store", contexts=60, codec=codec, chunk_rows=256, rows=lambda n, d: strange_rows(pattern, n, d)
    )
    everywhere = strange_rows(pattern, 60 * 32, 32).view(np.uint16)
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
    assert assert_harmless(store.path) == ""


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
    assert assert_harmless(store.path) != ""


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
    """Return the bytes of a manifest with its three sums corrected as far as possible, as an attacker would do."""
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
        assert_harmless(store.path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON, name=st.sampled_from(["plan.json", "shards/train-00000.json"]))
def test_any_field_of_a_plan_or_record_replaced_by_anything_is_an_error_or_harmless(
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
    """Put all train rows into one window of very many rows."""
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
        (lambda m: m["files"][0].update(path="../../etc/passwd"), "a path inside the store"),
        (lambda m: m["plan"]["sites"][0].update(folder=".."), "reserved"),
        (lambda m: m["plan"]["sites"][0].update(folder="a/b"), "match pattern"),
        (lambda m: m["plan"]["sites"][0].update(name="\u001b[2J"), "match pattern"),
        (lambda m: m["plan"].update(rows=2**60), "less than"),
        (lambda m: m["plan"].update(rows=2**52), "windows are over"),
        (lambda m: m["plan"].update(rows=2**25), "does not list"),
        (lambda m: m["plan"].update(window_rows=2**50, chunk_rows=2**49), "a chunk of"),
        (lambda m: m["plan"].update(window_rows=2**50), "chunks is over"),
        (lambda m: m["plan"]["contexts"].update(contexts=2**52), "files of its plan"),
        (lambda m: m["plan"]["contexts"].update(documents=2**52), "files of its plan"),
        (lambda m: m["plan"]["tokenizer"].update(excluded_ids=[2**40]), "less than"),
        (lambda m: m["plan"].update(dropped_positions=[-1]), "greater than"),
        (lambda m: m["windows"].pop(), "does not list"),
        (lambda m: m["windows"][0]["arrays"].pop(), "arrays of its plan"),
        (lambda m: m["windows"][0]["arrays"][0].update(rows=1), "arrays of its plan"),
        (lambda m: m["windows"][0]["record"].update(path="plan.json"), "the name of another record"),
        (lambda m: m["files"].pop(), "files of its plan"),
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
        ("bins", [2**13, 2**13 + 1], "no rows can have these moments"),
        ("counts", [0], "another number of rows"),
        ("sums", "not base64!", "not base64"),
        ("sums", "AAAA", "bytes"),
        ("squares", "infinite", "no rows can have these moments"),
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
def test_other_data_in_place_of_a_manifest_is_one_short_error(store: Store, data: bytes) -> None:
    for name in ("manifest.json", "plan.json"):
        (store.path / name).write_bytes(data)
    assert "manifest.json" in assert_harmless(store.path)
    (store.path / "manifest.json").unlink()
    assert "plan.json" in assert_harmless(store.path)
