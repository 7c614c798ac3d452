"""Verification: every changed byte is found, faults name file and chunk, and a wrong order is a fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gsae.errors import CorruptError, GsaeError
from gsae.store import Store, VerifyProgress, foreign_files, open_store, verify
from gsae.store.format import row_order as order
from gsae.store.format.json_files import canonical_json
from gsae.store.format.manifest import PLAN
from gsae.store.write.contexts_writer import write_contexts
from gsae.store.write.window_writer import write_manifest, write_plan, write_window
from gsae.tests.support.children import files
from gsae.tests.support.stores import make_store, normal_rows, random_contexts, sources_of

SITES = {"mlp.1": 16, "attn.0": 8}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two sites, several windows, several chunks a window."""
    root = tmp_path_factory.mktemp("verify") / "store"
    return make_store(root, contexts=60, sites=SITES, window_rows=512, chunk_rows=128)


@pytest.fixture
def store(template: Store, tmp_path: Path) -> Store:
    return open_store(shutil.copytree(template.path, tmp_path / "store"))


def faults_of(root: Path) -> list[str]:
    try:
        return verify(open_store(root), deep=True, threads=1)
    except GsaeError as error:
        return [str(error)]


def change(path: Path, at: int, by: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= by
    path.write_bytes(data)


def found_in(faults: list[str], *said: str) -> bool:
    return any(all(part in fault for part in said) for fault in faults)


def test_a_good_store_has_no_faults(store: Store) -> None:
    assert verify(store) == verify(store, deep=True) == verify(store, deep=True, threads=1) == []


def read_all(root: Path) -> list[torch.Tensor]:
    """Return everything that can be read of a store: tokens, every site in stored order, and shuffled batches."""
    store = open_store(root)
    found = [torch.from_numpy(store.tokens())]
    for name in SITES:
        for split in order.SPLITS:
            for source, rows in store.site(name, split).in_order(300):
                found += [torch.from_numpy(source.copy()), rows.clone()]
    with store.site("mlp.1").batches(200, threads=1) as batches:
        return found + [rows.clone() for rows in batches]


@pytest.mark.slow
def test_of_300_changed_bytes_every_one_is_found_and_none_is_read_as_something_else(store: Store) -> None:
    rng = np.random.default_rng(0)
    names = list(files(store.path))
    sizes = np.array([(store.path / name).stat().st_size for name in names])
    whole = read_all(store.path)
    # Every file once, then bytes anywhere: half of them by files, half by bytes.
    picked = [*names, *rng.choice(names, 130), *rng.choice(names, 300, p=sizes / sizes.sum())][:300]
    misread, unnamed, unread = [], [], 0
    for name in map(str, picked):
        path = store.path / name
        at, by = int(rng.integers(path.stat().st_size)), int(rng.integers(1, 256))
        change(path, at, by)
        assert any(name in fault for fault in faults_of(store.path)), (name, at)
        try:
            found = read_all(store.path)
        except GsaeError as error:
            unnamed += [] if name in str(error) else [(name, str(error))]
            unread += 1
        else:
            misread += [name] if not all(map(torch.equal, found, whole)) else []
        change(path, at, by)
    assert misread == unnamed == []
    assert unread > 100
    assert faults_of(store.path) == []


def test_all_faults_are_listed_by_file_and_chunk(store: Store) -> None:
    root = store.path
    change(root / "train/mlp.1/c/0/0", 100)
    metadata = json.loads((root / "train/mlp.1/zarr.json").read_bytes())
    assert metadata["codecs"][0]["configuration"]["chunk_shape"] == [128, 16]
    change(root / "train/mlp.1/c/0/0", (root / "train/mlp.1/c/0/0").stat().st_size - 16 * 4 - 4 - 10)  # chunk 3
    change(root / "train/source/c/1", 5)
    change(root / "contexts/tokens/c/0/0", 20)
    (root / "heldout/mlp.1/c/0/0").unlink()
    (root / "heldout/attn.0/c/0/0").unlink()
    (root / "heldout/attn.0/c/0/0").mkdir()
    with (root / "train/source/c/0").open("ab") as file:
        file.write(b"x")
    (root / "train/mlp.1/zarr.json").write_text(json.dumps(metadata | {"shape": 3}))
    change(root / "shards/train-00001.json", 40)
    faults = verify(open_store(root), deep=True)
    for said in (
        ("train/mlp.1/c/0/0: chunk 0:", "crc32c"),
        ("train/mlp.1/c/0/0: chunk 3:", "crc32c"),
        ("train/mlp.1/c/0/0 was changed",),
        ("train/source/c/1: chunk 0:",),
        ("contexts/tokens/c/0/0: chunk 0:",),
        ("heldout/mlp.1/c/0/0 is missing",),
        ("heldout/attn.0/c/0/0 is a folder",),
        ("train/source/c/0 has",),
        ("train/mlp.1/zarr.json", "shape is 3, not ["),
        ("shards/train-00001.json",),
    ):
        assert found_in(faults, *said), said
    assert len(faults) == len(set(faults))


def test_the_quick_check_reads_no_rows_but_finds_a_damaged_index_and_a_changed_record(store: Store) -> None:
    shard = store.path / "train/mlp.1/c/0/0"
    change(shard, 100)
    assert verify(store) == []
    change(shard, shard.stat().st_size - 10)
    path = store.path / "shards/train-00000.json"
    path.write_bytes(path.read_bytes().replace(b'"window":0', b'"window":1'))
    faults = verify(store)
    assert found_in(faults, "train/mlp.1/c/0/0")
    assert found_in(faults, "train-00000.json was changed")
    assert found_in(faults, "disagree about its window")


def test_progress_is_reported_to_its_end(store: Store) -> None:
    seen: list[VerifyProgress] = []
    verify(store, listen=seen.append)
    assert [event.done for event in seen] == list(range(1, seen[-1].files + 1))
    assert len(seen) >= len(files(store.path)) - 1


def assert_quick_check_finds_nothing(root: Path) -> None:
    assert verify(open_store(root)) == []


def faults_of_forged(
    root: Path,
    template: Store,
    change: Callable[[str, np.ndarray], np.ndarray] = lambda split, source: source,
    change_record: Callable[[dict[str, Any]], None] = lambda record: None,
    **documents: np.ndarray,
) -> list[str]:
    """Write a store with correct sums but wrong rows or records; return the faults that the deep check finds."""
    arrays = random_contexts(60, 32) | {f"documents/{name}": value for name, value in documents.items()}
    plan = template.plan.model_copy(update={"contexts": write_contexts(root, arrays, ended_early=False)})
    write_plan(root, plan)
    x = {name: normal_rows(60 * 32, d_in) for name, d_in in SITES.items()}
    for split, window, source in sources_of(plan, arrays):
        changed = change(split, source)
        inside = np.clip(changed, 0, 60 * 32 - 1)
        write_window(root, plan, split, window, {name: rows[inside] for name, rows in x.items()}, changed)
    for path in (root / "shards").iterdir():
        record = json.loads(path.read_bytes())
        change_record(record)
        path.write_bytes(canonical_json(record))
    write_manifest(root, plan)
    assert_quick_check_finds_nothing(root)
    return verify(open_store(root), deep=True)


def swapped(split: str, source: np.ndarray) -> np.ndarray:
    changed = source.copy()
    changed[[130, 131]] = source[[131, 130]]
    return changed


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda split, s: np.sort(s), "not in the order that the plan dictates"),
        (lambda split, s: swapped(split, s) if split == "train" and len(s) == 512 else s, "c/0: chunk 1: sources"),
        (lambda split, s: np.concatenate([s[:1], s[:-1]]), "sources repeat"),
        (lambda split, s: s // 32 * 32, "tokens that are no rows"),
        (lambda split, s: s + 60 * 32, "outside the tokens"),
    ],
)  # fmt: skip
def test_rows_of_another_order_than_the_plan_dictates_are_found(
    tmp_path: Path, template: Store, wrong: Callable[[str, np.ndarray], np.ndarray], said: str
) -> None:
    faults = faults_of_forged(tmp_path / "s", template, wrong)
    assert found_in(faults, said)
    assert all("/source/c/" in fault for fault in faults)


def test_held_out_rows_in_train_are_found(tmp_path: Path, template: Store) -> None:
    tokens = random_contexts(60, 32)["contexts/tokens"]
    held = np.flatnonzero(order.row_mask(tokens[3:4], (1, 2), ())) + 3 * 32  # context 3 is held out

    def leak(split: str, source: np.ndarray) -> np.ndarray:
        return np.concatenate([held[:5], source[5:]]) if split == "train" else source

    assert found_in(
        faults_of_forged(tmp_path / "s", template, leak), "train/source/c/0: chunk 0: sources are of contexts"
    )


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ({"id": np.zeros(60, np.int64)}, "1 documents are both in train and held out"),
        ({"split": np.zeros(60, np.uint8)}, "begin in contexts of another split"),
        ({"start": np.arange(60)[::-1].copy()}, "not ascending"),
        ({"start": np.where(np.arange(60) == 3, 3 * 32 + 5, np.arange(60) * 32 + 1)}, "1 contexts begin inside"),
    ],
)
def test_documents_that_straddle_the_split_are_found(
    tmp_path: Path, template: Store, documents: dict[str, np.ndarray], said: str
) -> None:
    assert found_in(faults_of_forged(tmp_path / "s", template, **documents), said)


def test_moments_that_are_not_those_of_the_rows_are_found(tmp_path: Path, template: Store) -> None:
    def wrong(record: dict[str, Any]) -> None:
        counts = record["moments"]["attn.0"]["counts"]
        most = counts.index(max(counts))
        counts[most], counts[most - 1] = counts[most] - 1, counts[most - 1] + 1

    faults = faults_of_forged(tmp_path / "s", template, change_record=wrong)
    assert len(faults) == len(template.manifest.windows)
    assert found_in(faults, "moments of 'attn.0'", "shards/heldout-00000.json", "heldout/attn.0/c/0/0")


def test_moments_may_be_added_up_in_any_order(tmp_path: Path, template: Store) -> None:
    """Another writer's float64 sums may differ in their last bits, which is not a fault."""
    import base64

    def nudge(record: dict[str, Any]) -> None:
        for moments in record["moments"].values():
            sums = np.frombuffer(base64.b64decode(moments["sums"]), "<f8") * (1 + 4e-16)
            moments["sums"] = base64.b64encode(sums.tobytes()).decode()

    assert faults_of_forged(tmp_path / "s", template, change_record=nudge) == []


def test_foreign_files_are_listed_and_are_faults_only_if_they_could_be_taken_for_the_stores(store: Store) -> None:
    harmless = ["notes.txt", "train/mlp.1/README"]
    shadows = ["train/mlp.1/.zarray", "train/mlp.1/c/0/9", "shards/train-00077.json"]
    for name in [*harmless, *shadows, "train/old/data.bin", ".tmp/left-over"]:
        (store.path / name).parent.mkdir(parents=True, exist_ok=True)
        (store.path / name).write_text("x")
    (store.path / "elsewhere").symlink_to("/")
    assert foreign_files(store) == sorted([*harmless, *shadows, "train/old/", "elsewhere/"])
    faults = verify(store, deep=True)
    assert all(found_in(faults, name, "is not of this store") for name in shadows)
    assert len(faults) == len(shadows)


def test_a_manifest_that_was_edited_is_refused_on_opening(store: Store) -> None:
    path = store.path / "manifest.json"
    good = path.read_bytes()
    for old, new, said in (
        (b'"seed":0', b'"seed":1', "was changed"),
        (b'{"digest"', b'{ "digest"', "canonical"),
        (b'"train/mlp.1/c/0/0"', b'"../../etc/passwd/0"', "holds a value that cannot be"),
        (b'"d_in":16', b'"d_in":-2', "holds a value that cannot be"),
        (b"{", b"[", "JSON"),
    ):
        assert old in good
        path.write_bytes(good.replace(old, new, 1))
        with pytest.raises(CorruptError, match=said):
            open_store(store.path)


def test_an_edited_plan_is_named_with_its_field(store: Store) -> None:
    path = store.path / PLAN
    path.write_bytes(path.read_bytes().replace(b'"seed":0', b'"seed":7'))
    assert found_in(verify(store), "plan.json was changed: it is not what the plan gives: seed is 7, not 0")
    path.write_bytes(canonical_json([]))
    assert found_in(verify(store), "plan.json", "no JSON object")
