"""An interrupted harvest becomes a store of its finished windows, which is read and verified like any other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from gsae.errors import CorruptError, IncompatibleError, NotFoundError
from gsae.store import Store, describe, open_store, seal, verify
from gsae.store.format.json_files import canonical_json, sha256
from gsae.store.format.manifest import MANIFEST, all_windows, digest, read_manifest
from gsae.store.format.moments import Moments
from gsae.store.write.contexts_writer import write_contexts
from gsae.store.write.window_writer import write_manifest, write_plan, write_window
from gsae.tests.support.children import files
from gsae.tests.support.stores import make_plan, normal_rows, random_contexts, sources_of

CONTEXTS, CONTEXT_SIZE, D_IN = 100, 32, 16
EVERYWHERE = normal_rows(CONTEXTS * CONTEXT_SIZE, D_IN)


def harvest_without(root: Path, *missing: tuple[str, int]) -> None:
    """Write all windows but these, and no manifest."""
    arrays = random_contexts(CONTEXTS, CONTEXT_SIZE)
    spec = write_contexts(root, arrays, ended_early=False)
    plan = make_plan(spec, arrays, {"mlp.1": D_IN}, window_rows=512, chunk_rows=64)
    write_plan(root, plan)
    for split, window, source in sources_of(plan, arrays):
        if (split, window) not in missing:
            write_window(root, plan, split, window, {"mlp.1": EVERYWHERE[source]}, source)


@pytest.fixture
def sealed(tmp_path: Path) -> Store:
    """Train windows 0, 2 and 4 of 0 to 4; the last is a short one."""
    harvest_without(tmp_path / "store", ("train", 1), ("train", 3))
    return seal(tmp_path / "store")


def test_a_sealed_store_passes_every_check(sealed: Store) -> None:
    assert sealed.sealed
    assert sealed.windows("train") == [0, 2, 4]
    assert verify(sealed, deep=True) == []
    assert open_store(sealed.path).manifest == sealed.manifest
    facts = describe(sealed.path)
    assert facts["state"] == "sealed"
    assert facts["rows"]["train"] == sealed.site("mlp.1").rows


def test_its_rows_are_those_of_its_windows_each_once_an_epoch(sealed: Store) -> None:
    site = sealed.site("mlp.1")
    source = np.concatenate([s for s, _ in site.in_order()])
    assert site.rows == len(source) == 2 * 512 + sealed.plan.rows % 512
    stored = torch.cat([rows for _, rows in site.in_order()]).float().numpy()
    assert np.array_equal(stored, EVERYWHERE[source].astype(np.float32))
    read = torch.cat(list(site.batches(100, mix=3, open_windows=2))).float().numpy()
    assert np.array_equal(np.sort(read, axis=0), np.sort(stored, axis=0))
    whole = Moments.of(EVERYWHERE[source], "bfloat16").within(0)
    assert site.moments.within(0).rows == whole.rows == site.rows
    np.testing.assert_allclose(site.moments.within(0).mean, whole.mean, rtol=1e-12)


def test_zarr_reads_the_rows_of_missing_windows_as_not_a_number(sealed: Store) -> None:
    rows = np.asarray(zarr.open(sealed.path, mode="r")["train/mlp.1"]).astype(np.float32)
    window = np.arange(len(rows)) // 512
    assert np.isnan(rows[np.isin(window, [1, 3])]).all()
    assert np.isfinite(rows[np.isin(window, [0, 2, 4])]).all()


def test_its_digest_is_its_own(sealed: Store, tmp_path: Path) -> None:
    harvest_without(tmp_path / "whole")
    write_manifest(tmp_path / "whole", sealed.plan)
    assert open_store(tmp_path / "whole").digest != sealed.digest
    assert not open_store(tmp_path / "whole").sealed


def test_it_never_changes_again(sealed: Store) -> None:
    before = files(sealed.path)
    assert seal(sealed.path).manifest == sealed.manifest
    for split, window, source in sources_of(sealed.plan, random_contexts(CONTEXTS, CONTEXT_SIZE)):
        rows = {"mlp.1": EVERYWHERE[source]}
        if (split, window) in {("train", 1), ("train", 3)}:
            with pytest.raises(IncompatibleError, match=f"sealed without train window {window}"):
                write_window(sealed.path, sealed.plan, split, window, rows, source)
        else:
            write_window(sealed.path, sealed.plan, split, window, rows, source)
    assert files(sealed.path) == before


def test_files_of_a_window_without_a_record_are_removed(tmp_path: Path) -> None:
    harvest_without(tmp_path / "store", ("train", 1))
    (tmp_path / "store/shards/train-00003.json").unlink()
    (tmp_path / "store/train/source/c/3").unlink()
    names = set(files(seal(tmp_path / "store").path))
    assert not [name for name in names if "c/3" in name or "00003" in name]
    assert "train/mlp.1/c/2/0" in names


def test_sealing_a_harvest_that_lacks_only_its_manifest_gives_the_usual_store(tmp_path: Path) -> None:
    for name in ("sealed", "finished"):
        harvest_without(tmp_path / name)
    store = seal(tmp_path / "sealed")
    write_manifest(tmp_path / "finished", store.plan)
    assert not store.sealed
    assert files(tmp_path / "sealed") == files(tmp_path / "finished")


def test_without_a_train_window_there_is_nothing_to_seal(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no harvest"):
        seal(tmp_path)
    harvest_without(tmp_path / "store", *(("train", w) for w in range(5)))
    before = files(tmp_path / "store")
    with pytest.raises(IncompatibleError, match="No train window"):
        seal(tmp_path / "store")
    assert files(tmp_path / "store") == before


@pytest.mark.parametrize("changed", [{"sealed": False}, {"windows": "reversed"}, {"windows": "twice"}])
def test_a_manifest_with_inconsistent_windows_is_refused(sealed: Store, changed: dict[str, Any]) -> None:
    windows = sealed.manifest.windows
    forms = {"reversed": windows[::-1], "twice": (*windows[:1], *windows)}
    forged = sealed.manifest.model_copy(update={k: forms.get(v, v) for k, v in changed.items()})
    forged = forged.model_copy(update={"digest": digest(forged.plan, list(forged.windows))})
    body = forged.model_dump(mode="json", exclude={"sha256"})
    with pytest.raises(CorruptError, match="does not list the"):
        read_manifest(canonical_json(body | {"sha256": sha256(canonical_json(body))}), MANIFEST)


def test_a_harvest_into_a_sealed_store_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from gsae.harvest import HarvestConfig, harvest

    config = HarvestConfig(
        model=str(tiny_llama), dataset="builtin:pydoc", sites=("mlp.0",), rows=900, context_size=32, window_rows=512
    )
    store = harvest(config, tmp_path / "store")
    (store.path / "manifest.json").unlink()
    (store.path / "shards/train-00001.json").unlink()
    assert all_windows(store.plan)[-1] == ("train", 1)
    seal(store.path)
    with pytest.raises(IncompatibleError, match="was sealed with"):
        harvest(config, store.path)
