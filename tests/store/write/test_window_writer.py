"""Writing a window: the same bytes on any number of threads, correct sums, and memory of one chunk a thread."""

import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gsae.store import Plan, chunk_rows, open_store, verify
from gsae.store.codec.chunks import NUMPY_DTYPES
from gsae.store.format.json_files import parse
from gsae.store.format.manifest import Record, WindowTotals, record_name
from gsae.store.format.moments import Moments
from gsae.store.write.contexts_writer import write_contexts
from gsae.store.write.window_writer import encode_window, unfinished, write_manifest, write_plan, write_window
from gsae.tests.support.children import files
from gsae.tests.support.stores import make_plan, normal_rows, random_contexts, sources_of

pytestmark = pytest.mark.slow

SITES = {"mlp.1": 24, "attn.2": 7}
CONTEXTS, CONTEXT_SIZE = 60, 32


def begin(root: Path, sites: dict[str, int] = SITES, **fields: Any) -> Plan:
    arrays = random_contexts(CONTEXTS, CONTEXT_SIZE)
    settings = {"window_rows": 2048, "chunk_rows": 64} | fields
    plan = make_plan(write_contexts(root, arrays, ended_early=False), arrays, sites, **settings)
    write_plan(root, plan)
    return plan


def rows_at(source: np.ndarray, sites: dict[str, int] = SITES, dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    everywhere = {name: normal_rows(CONTEXTS * CONTEXT_SIZE, d_in) for name, d_in in sites.items()}
    return {name: x[source].astype(NUMPY_DTYPES[dtype]) for name, x in everywhere.items()}


def write_all(root: Path, plan: Plan, threads: int | None = None) -> None:
    for split, window, source in sources_of(plan, random_contexts(CONTEXTS, CONTEXT_SIZE)):
        write_window(root, plan, split, window, rows_at(source, dtype=plan.model.dtype), source, threads)
    write_manifest(root, plan)


@pytest.mark.parametrize("fields", [{}, {"codec": "zstd"}, {"codec": "none", "dtype": "float32"}])
def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path, fields: dict[str, Any]) -> None:
    for threads in (1, 2, 5, None):
        write_all(tmp_path / str(threads), begin(tmp_path / str(threads), **fields), threads)
    whole = files(tmp_path / "1")
    assert all(files(tmp_path / str(threads)) == whole for threads in (2, 5, None))
    assert verify(open_store(tmp_path / "5"), deep=True) == []


def test_a_record_has_the_sums_of_the_rows_and_of_the_files(tmp_path: Path) -> None:
    plan = begin(tmp_path)
    split, window, source = sources_of(plan, random_contexts(CONTEXTS, CONTEXT_SIZE))[-1]
    rows = rows_at(source)
    write_window(tmp_path, plan, split, window, rows, source, threads=3)
    name = record_name(split, window)
    record = parse(Record, (tmp_path / name).read_bytes(), name)
    for entry, raw in zip(record.arrays, [*rows.values(), source], strict=True):
        assert entry.rows == len(source)
        assert entry.raw_sha256 == hashlib.sha256(raw.tobytes()).hexdigest()
        data = (tmp_path / entry.file.path).read_bytes()
        assert (entry.file.size, entry.file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for site in plan.sites:
        assert record.moments[site.name] == Moments.of(rows[site.name], "bfloat16").to_record()
        summary = record.moments[site.name].read(site.d_in).within(0)
        np.testing.assert_allclose(
            summary.mean, rows[site.name].astype(np.float64).mean(axis=0), rtol=1e-12, atol=1e-14
        )


def test_rows_may_change_once_their_window_is_encoded(tmp_path: Path) -> None:
    """A harvest fills the buffer of a window again while the window is still being published."""
    for name in ("undisturbed", "changed"):
        plan = begin(tmp_path / name)
        for split, window, source in sources_of(plan, random_contexts(CONTEXTS, CONTEXT_SIZE)):
            rows = rows_at(source)
            encoded = encode_window(tmp_path / name, plan, split, window, rows, source)
            assert (split, window) in unfinished(tmp_path / name, plan)
            if name == "changed":
                for array in rows.values():
                    array[:] = 1
            encoded.publish()
        write_manifest(tmp_path / name, plan)
    assert files(tmp_path / "changed") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("known", [(), (0, 1, 2), (0,), (0, 2), (1, 2)])
def test_a_manifest_is_the_same_whichever_windows_are_added_while_they_are_published(
    tmp_path: Path, known: tuple[int, ...]
) -> None:
    """A harvest that goes on after a stop, or is made by several workers, has not published all windows itself."""
    write_all(tmp_path / "read", begin(tmp_path / "read", window_rows=1024))
    plan = begin(tmp_path / "added", window_rows=1024)
    windows = sources_of(plan, random_contexts(CONTEXTS, CONTEXT_SIZE))
    assert len(windows) == 3
    totals = WindowTotals(plan)
    for number, (split, window, source) in enumerate(windows):
        encoded = encode_window(tmp_path / "added", plan, split, window, rows_at(source), source)
        encoded.publish(totals if number in known else None)
    assert len(totals.windows) == {(0, 1, 2): 3, (0,): 1, (0, 2): 1}.get(known, 0)
    write_manifest(tmp_path / "added", plan, totals=totals)
    assert files(tmp_path / "added") == files(tmp_path / "read")


def test_a_file_that_another_writer_published_is_kept_and_described(tmp_path: Path) -> None:
    """Two workers on hardware that differs; the first was stopped after its first file."""
    plan = begin(tmp_path)
    split, window, source = sources_of(plan, random_contexts(CONTEXTS, CONTEXT_SIZE))[-1]
    theirs = {name: (x.astype(np.float32) * 3).astype(ml_dtypes.bfloat16) for name, x in rows_at(source).items()}
    write_window(tmp_path, plan, split, window, theirs, source)
    (tmp_path / record_name(split, window)).unlink()
    kept = (tmp_path / f"train/mlp.1/c/{window}/0").read_bytes()
    (tmp_path / f"train/attn.2/c/{window}/0").unlink()
    write_all(tmp_path, plan)
    assert (tmp_path / f"train/mlp.1/c/{window}/0").read_bytes() == kept
    store = open_store(tmp_path)
    assert verify(store, deep=True) == []
    for name, of in (("mlp.1", theirs), ("attn.2", rows_at(source))):
        _, stored = next(store.site(name).in_order(10**6))
        assert np.array_equal(stored.float().numpy(), of[name].astype(np.float32))


def test_rows_of_another_shape_than_the_plan_has_are_refused(tmp_path: Path) -> None:
    plan = begin(tmp_path)
    split, window, source = sources_of(plan, random_contexts(CONTEXTS, CONTEXT_SIZE))[-1]
    before = files(tmp_path)
    for wrong in (np.zeros((len(source), 8), ml_dtypes.bfloat16), np.zeros((len(source) - 1, 7), ml_dtypes.bfloat16)):
        with pytest.raises(ValueError, match=rf"train/attn.2.*\({len(source)}, 7\) are needed"):
            write_window(tmp_path, plan, split, window, rows_at(source) | {"attn.2": wrong}, source)
    assert files(tmp_path) == before
    assert (split, window) in unfinished(tmp_path, plan)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_memory_beyond_the_rows_is_some_chunks_a_thread_whatever_the_window(tmp_path: Path, threads: int) -> None:
    rows, d_in = 1 << 15, 512
    chunk = 128 * d_in * 2
    arrays = random_contexts(CONTEXTS, CONTEXT_SIZE)
    spec = write_contexts(tmp_path, arrays, ended_early=False)
    plan = make_plan(spec, arrays, {"mlp.1": d_in}, window_rows=rows, chunk_rows=128, rows=2 * rows)
    assert chunk_rows(d_in, "bfloat16", rows) * d_in * 2 == 4 << 20
    x = np.resize(normal_rows(512, d_in), (rows, d_in))
    source = np.arange(rows, dtype=np.int64)
    write_window(tmp_path, plan, "train", 0, {"mlp.1": x}, source, threads)  # compiles
    tracemalloc.start()
    write_window(tmp_path, plan, "train", 1, {"mlp.1": x}, source, threads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    constant = 1 << 20  # the sums of each bin, the index, the record
    assert peak < 4 * threads * chunk + constant < x.nbytes / 10
