"""Copies: the same bytes, the same rows in another codec, or a part that names its parent; resumable and atomic."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gsae.errors import CorruptError, IncompatibleError, NotFoundError, RemoteError, UsageError
from gsae.store import Store, copy, list_stores, open_store, verify
from gsae.store.places.folder import Folder
from gsae.tests.support.calls import recorded
from gsae.tests.support.children import files, start
from gsae.tests.support.killing import Step, assert_survives_every_kill, write_three_windows
from gsae.tests.support.sharing import SITE, assert_opened_whole_during_a_copy, copy_beside, recode_beside
from gsae.tests.support.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two sites, five train windows."""
    root = tmp_path_factory.mktemp("copy") / "store"
    return make_store(root, contexts=100, window_rows=512, chunk_rows=64, sites={SITE: 32, "mlp.2": 16})


def stored_rows(store: Store, site: str, split: Any = "train") -> Any:
    return np.concatenate([x.view(torch.int16).numpy() for _, x in store.site(site, split).in_order()])


@pytest.mark.parametrize(("came", "goes"), [("", ""), ("", "file://"), ("file://", "")])
def test_a_copy_has_the_same_bytes(store: Store, tmp_path: Path, came: str, goes: str) -> None:
    told: list[Any] = []
    assert copy(f"{came}{store.path}", f"{goes}{tmp_path / 'copy'}", listen=told.append) == store.digest
    assert files(tmp_path / "copy") == files(store.path)
    last = told[-1]
    assert (last.files, last.bytes) == (last.all_files, last.all_bytes)
    assert last.sent == last.all_bytes == store.bytes


@pytest.mark.parametrize("goes", ["", "file://"])
def test_files_that_the_target_has_are_not_sent_again(store: Store, tmp_path: Path, goes: str) -> None:
    told: list[Any] = []
    target = tmp_path / "copy"
    copy(store.path, f"{goes}{target}")
    for gone in ("manifest.json", "shards/train-00001.json", f"train/{SITE}/c/1/0"):
        (target / gone).unlink()
    copy(store.path, f"{goes}{target}", listen=told.append)
    assert files(target) == files(store.path)
    sizes = [(store.path / name).stat().st_size for name in ("shards/train-00001.json", f"train/{SITE}/c/1/0")]
    assert told[-1].sent == sum(sizes)


def test_the_plan_is_first_then_files_then_records_and_the_manifest_last(store: Store, tmp_path: Path) -> None:
    calls = recorded(tmp_path / "copy", lambda: copy(store.path, tmp_path / "copy"))
    names = [call.path for call in calls if call.kind == "link"]
    records = [i for i, name in enumerate(names) if name.startswith("shards/")]
    assert (names[0], names[-1]) == ("plan.json", "manifest.json")
    assert records == list(range(len(names) - 1 - len(records), len(names) - 1))
    assert sorted(names) == sorted(files(store.path))


@pytest.mark.parametrize("goes", ["", "file://"])
def test_a_source_file_that_was_changed_is_named_and_not_copied(tmp_path: Path, goes: str) -> None:
    source = make_store(tmp_path / "source", contexts=60).path
    name = "train/mlp.1/c/0/0"
    data = bytearray((source / name).read_bytes())
    data[77] ^= 1
    (source / name).write_bytes(data)
    with pytest.raises(CorruptError, match=rf"source/{name} has {len(data)} bytes with sha256 .* were written"):
        copy(source, f"{goes}{tmp_path / 'copy'}")
    assert {name, "manifest.json"}.isdisjoint(files(tmp_path / "copy"))


def test_a_destination_with_different_content_is_left_unchanged(store: Store, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", contexts=60)
    before = files(other.path)
    for target in (str(other.path), f"file://{other.path}"):
        with pytest.raises(
            IncompatibleError, match=r"plan\.json already exists with different content; left unchanged"
        ):
            copy(store.path, target)
    assert files(other.path) == before
    (tmp_path / "odd" / "train" / SITE / "c/0").mkdir(parents=True)
    (tmp_path / "odd" / "train" / SITE / "c/0/0").write_text("mine")
    with pytest.raises(IncompatibleError, match="c/0/0 already exists with different content"):
        copy(store.path, tmp_path / "odd")


def test_a_source_that_is_not_a_complete_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is no gsae store"):
        copy(tmp_path, tmp_path / "copy")
    unfinished = make_store(tmp_path / "s", contexts=60).path
    (unfinished / "manifest.json").unlink()
    for source in (str(unfinished), f"file://{unfinished}"):
        with pytest.raises(IncompatibleError, match=r"not finished: \d of \d windows"):
            copy(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(("codec", "level", "goes"), [("zstd", 3, ""), ("none", None, "file://"), (None, 0, "")])
def test_another_codec_keeps_the_digest_and_the_rows(
    store: Store, tmp_path: Path, codec: Any, level: int | None, goes: str
) -> None:
    told: list[Any] = []
    target = f"{goes}{tmp_path / 'copy'}"
    assert copy(store.path, target, codec=codec, level=level, listen=told.append) == store.digest
    made = open_store(tmp_path / "copy")
    assert verify(made, deep=True) == []
    assert (made.plan.codec, made.plan.level) == (codec or "planes", 1 if level is None else level)
    assert made.plan.parent is None
    assert np.array_equal(stored_rows(made, SITE), stored_rows(store, SITE))
    assert (told[-1].files, told[-1].bytes) == (told[-1].all_files, told[-1].all_bytes)
    copy(store.path, target, codec=codec, level=level, listen=told.append)
    assert told[-1].sent == 0


def test_a_part_has_its_own_digest_and_names_its_parent(store: Store, tmp_path: Path) -> None:
    digest = copy(store.path, tmp_path / "part", sites=["mlp.2"], windows=2)
    part = open_store(tmp_path / "part")
    assert verify(part, deep=True) == []
    assert part.digest == digest != store.digest
    assert part.plan.parent == store.digest
    assert [site.name for site in part.plan.sites] == ["mlp.2"]
    assert part.site("mlp.2").rows == part.plan.rows == 2 * 512
    assert np.array_equal(stored_rows(part, "mlp.2"), stored_rows(store, "mlp.2")[: 2 * 512])
    assert np.array_equal(stored_rows(part, "mlp.2", "heldout"), stored_rows(store, "mlp.2", "heldout"))
    assert (tmp_path / "part/train/mlp.2/c/1/0").read_bytes() == (store.path / "train/mlp.2/c/1/0").read_bytes()
    copy(store.path, tmp_path / "whole", sites=["mlp.2", SITE], windows=len(store.windows("train")))
    assert files(tmp_path / "whole") == files(store.path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sites": ["mlp.9"]}, r"got mlp\.9; the store has mlp\.1, mlp\.2"),
        ({"sites": []}, "got none"),
        ({"windows": 0}, "got 0; the store has"),
        ({"windows": 99}, "got 99; the store has"),
        ({"codec": "planes", "level": 2}, "codec planes needs 0 to 1"),
    ],
)
def test_a_part_or_codec_that_is_not_possible_is_refused(
    store: Store, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        copy(store.path, tmp_path / "copy", **options)


@pytest.mark.kill
@pytest.mark.parametrize("step", [copy_beside, recode_beside], ids=["whole", "part"])
def test_killed_before_or_after_any_call_the_same_copy_ends_in_the_same_files(memory: Path, step: Step) -> None:
    write_three_windows(memory / "source")
    assert_survives_every_kill(None, step, memory, calls=100)


@pytest.mark.kill
def test_readers_during_a_copy_see_no_store_or_all_of_it(store: Store, tmp_path: Path) -> None:
    ready = [tmp_path / f"ready{i}" for i in range(8)]
    readers = [start(assert_opened_whole_during_a_copy, tmp_path / "copy", store.digest, each) for each in ready]
    while not all(each.exists() for each in ready):
        assert all(reader.is_alive() for reader in readers)
    copy(store.path, tmp_path / "copy")
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0] * 8


@pytest.mark.parametrize(("umask", "mode"), [(0o002, "664"), (0o027, "640")])
def test_permissions_follow_the_umask(store: Store, tmp_path: Path, umask: int, mode: str) -> None:
    before = os.umask(umask)
    try:
        copy(store.path, tmp_path / "copy")
    finally:
        os.umask(before)
    assert {f"{p.stat().st_mode & 0o777:o}" for p in (tmp_path / "copy").rglob("*") if p.is_file()} == {mode}


def test_the_first_error_ends_the_copy(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def refuse(self: Folder, entry: Any, blocks: Any) -> None:
        begun.append(entry.path)
        if entry.path != "plan.json":
            raise RemoteError("gone")

    monkeypatch.setattr(Folder, "put", refuse)
    with pytest.raises(RemoteError, match="gone"):
        copy(store.path, tmp_path / "copy", streams=2)
    assert len(begun) < 10


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_stores_under_a_root_are_listed(tmp_path: Path, scheme: str) -> None:
    a = make_store(tmp_path / "team/a", contexts=60)
    b = make_store(tmp_path / "team/deep/b", contexts=60, sites={"mlp.1": 8, "mlp.2": 8})
    (b.path / "manifest.json").unlink()
    (b.path / "shards/train-00000.json").unlink()
    c = make_store(tmp_path / "c", contexts=60)
    (c.path / "manifest.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    root = f"{scheme}{tmp_path}"
    found = {each.path: each for each in list_stores(root)}
    assert sorted(found) == [f"{root}/c", f"{root}/team/a", f"{root}/team/deep/b"]
    whole, half = found[f"{root}/team/a"], found[f"{root}/team/deep/b"]
    size = sum(len(data) for data in files(a.path).values())
    rows = {"train": a.plan.rows, "heldout": a.plan.heldout_rows}
    assert (whole.model, whole.sites, whole.rows, whole.bytes) == ("tiny", ("mlp.1",), rows, size)
    assert whole.state == "complete"
    assert (half.sites, half.state) == (("mlp.1", "mlp.2"), "unfinished (2 of 3 windows)")
    assert half.bytes == sum(len(data) for data in files(b.path).values())
    assert "manifest.json" in found[f"{root}/c"].state
    assert list_stores(f"{root}/team/a") == [whole]
    assert list_stores(f"{root}/notes") == []
