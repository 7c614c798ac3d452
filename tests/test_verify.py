"""Verification: every changed byte is found, every fault is named, and a wrong order is one of them."""

from pathlib import Path

import numpy as np
import pytest

from gsae.store import CorruptError, GsaeError, Store, open_store, order, verify
from gsae.store.manifest import PLAN
from gsae.store.plan import canonical_json
from gsae.store.writer import write_manifest, write_plan, write_window
from gsae.tests.children import files
from gsae.tests.stores import make_store, normal_rows, random_contexts, sources_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", contexts=80)


def faults_of(root: Path) -> list[str]:
    try:
        return verify(open_store(root), deep=True)
    except GsaeError as error:
        return [str(error)]


def test_a_good_store_has_no_faults(store: Store) -> None:
    assert verify(store) == verify(store, deep=True) == []


def test_a_change_of_one_bit_in_any_file_is_found(store: Store) -> None:
    rng = np.random.default_rng(0)
    names = list(files(store.path))
    for name in [*names, *rng.choice(names, 30)]:
        path = store.path / str(name)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        assert faults_of(store.path), name
        path.write_bytes(good)
    assert faults_of(store.path) == []


def test_all_faults_are_listed_by_name(store: Store) -> None:
    (store.path / "heldout/mlp.1/c/0/0").unlink()
    with (store.path / "train/source/c/0").open("ab") as file:
        file.write(b"x")
    (store.path / "train/mlp.1/zarr.json").write_text("{}")
    faults = verify(store)
    assert any("heldout/mlp.1/c/0/0 is missing" in f for f in faults)
    assert any("train/source/c/0 has" in f for f in faults)
    assert any("train/mlp.1/zarr.json" in f for f in faults)


def test_the_quick_check_finds_a_truncated_and_a_changed_record(store: Store) -> None:
    path = store.path / "shards/train-00000.json"
    path.write_bytes(path.read_bytes().replace(b'"window":0', b'"window":1'))
    assert any("train-00000.json was changed" in f for f in verify(store))


def test_rows_in_another_order_than_the_plan_dictates_are_found(tmp_path: Path) -> None:
    """A store that is consistent in itself, with every sum right, but written without the shuffle."""
    root = tmp_path / "store"
    template = make_store(tmp_path / "template", contexts=80)
    arrays = random_contexts(80, 32)
    from gsae.store.contexts import write_contexts

    write_contexts(root, arrays, ended_early=False)
    write_plan(root, template.plan)
    x = normal_rows(80 * 32, 32)
    for split, window, source in sources_of(template.plan, arrays):
        unshuffled = np.sort(source)
        write_window(root, template.plan, split, window, {"mlp.1": x[unshuffled]}, unshuffled)
    write_manifest(root, template.plan)
    assert verify(open_store(root)) == []
    assert any("not in the order that the plan dictates" in f for f in verify(open_store(root), deep=True))


def test_a_manifest_that_was_edited_is_refused_on_opening(store: Store) -> None:
    path = store.path / "manifest.json"
    good = path.read_bytes()
    for old, new, said in (
        (b'"seed":0', b'"seed":1', "was changed"),
        (b'{"digest"', b'{ "digest"', "canonical"),
        (b'"train/mlp.1/c/0/0"', b'"../../etc/passwd/0"', "not what it should be"),
        (b'"d_in":32', b'"d_in":-2', "not what it should be"),
        (b"{", b"[", "JSON"),
    ):
        assert old in good
        path.write_bytes(good.replace(old, new, 1))
        with pytest.raises(CorruptError, match=said):
            open_store(store.path)


def test_an_edited_plan_is_not_gone_on_with(store: Store) -> None:
    path = store.path / PLAN
    path.write_bytes(canonical_json({"schema_version": "1.0"}))
    assert any("plan.json" in f for f in verify(store))


def test_the_split_of_a_store_is_disjoint(store: Store) -> None:
    train, held = (np.concatenate([s for s, _ in store.site("mlp.1", split).in_order()]) for split in order.SPLITS)
    assert not set(train // 32) & set(held // 32)
