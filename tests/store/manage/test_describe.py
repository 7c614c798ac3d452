"""`describe`: numbers equal brute force over the rows; for an unfinished store, missing windows are listed."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gsae.errors import NotFoundError
from gsae.store import Store, describe, open_store
from gsae.store.manage.describe import PERCENTILES
from gsae.tests.support.stores import make_store, normal_rows

BIN = 2 ** (1 / 16)  # the largest ratio of two norms in one bin


def massive_rows(rows: int, d_in: int) -> np.ndarray:
    """A few rows hold most of the squares, one is zero, and two are not finite."""
    x = normal_rows(rows, d_in).astype(np.float32)
    x[5::400] *= 200
    x[7] = 0
    x[[11, 900], 3] = np.nan, np.inf
    return x.astype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(
        tmp_path_factory.mktemp("info") / "store",
        contexts=400,
        sites={"mlp.1": 32, "attn.0": 8},
        rows=massive_rows,
        window_rows=1024,
    )


@pytest.fixture(scope="module")
def facts(store: Store) -> dict[str, Any]:
    return describe(store.path)


@pytest.mark.parametrize("site", ["mlp.1", "attn.0"])
def test_norms_are_those_of_the_rows_to_the_stated_resolution(store: Store, facts: dict[str, Any], site: str) -> None:
    x = np.concatenate([rows.double().numpy() for _, rows in store.site(site).in_order()])
    x = x[np.isfinite(x).all(axis=1)]
    norms = np.sort(np.sqrt((x**2).sum(axis=1)))
    told = facts["moments"][site]
    assert told["non_finite_rows"] == store.site(site).rows - len(x) == 2
    assert told["norm_of_mean"] == pytest.approx(np.linalg.norm(x.mean(axis=0)), rel=1e-9)
    assert told["root_mean_square_norm"] == pytest.approx(np.sqrt((norms**2).mean()), rel=1e-9)
    assert told["mean_norm"] == pytest.approx(norms.mean(), rel=1e-3)
    assert set(told["norm_percentiles"]) == {f"{p:g}" for p in PERCENTILES}
    for name, value in told["norm_percentiles"].items():
        exact = norms[int(np.ceil(float(name) / 100 * len(norms))) - 1]
        assert exact / BIN < value < exact * BIN, name
    assert norms[-1] / BIN < told["largest_norm"] <= norms[-1] * (1 + 1e-9)
    largest = norms[-int(np.ceil(len(norms) / 1000)) :]
    share = (largest**2).sum() / (norms**2).sum()
    assert share > 0.3
    assert told["largest_share_of_squares"] == pytest.approx(share, rel=BIN**2 - 1)


def test_sizes_rows_and_origins_are_described(store: Store, facts: dict[str, Any]) -> None:
    files = {path: path.stat().st_size for path in store.path.rglob("*") if path.is_file()}
    assert facts["bytes"] == sum(size for path, size in files.items() if path.name != "manifest.json")
    for name, site in facts["moments"].items():
        own = sum(size for path, size in files.items() if f"/{name}/c/" in str(path))
        raw = sum(store.site(name, split).rows for split in ("train", "heldout")) * facts["sites"][name]["d_in"] * 2
        assert (site["bytes"], site["ratio"]) == (own, own / raw)
    assert facts["rows"] == {"train": store.plan.rows, "heldout": store.plan.heldout_rows}
    assert (facts["model"], facts["seed"], facts["dtype"]) == ("tiny", 0, "bfloat16")
    assert (facts["state"], facts["digest"]) == ("complete", store.digest)
    json.dumps(facts, allow_nan=False)


def test_rows_that_are_all_zero_or_not_finite_are_described(tmp_path: Path) -> None:
    for name, value in (("zero", 0.0), ("nothing", np.nan)):
        store = make_store(
            tmp_path / name, contexts=60, rows=lambda n, d, v=value: np.full((n, d), v, ml_dtypes.bfloat16)
        )
        told = describe(store.path)["moments"]["mlp.1"]
        assert told["root_mean_square_norm"] == told["their_share_of_squares"] == 0
        assert told["non_finite_rows"] == (store.plan.rows if name == "nothing" else 0)
        assert told.get("norm_percentiles", {"50": 0})["50"] == 0
        json.dumps(told, allow_nan=False)


def test_the_missing_windows_of_an_unfinished_store_are_listed(tmp_path: Path) -> None:
    root = make_store(tmp_path / "store", contexts=140, window_rows=512).path
    (root / "manifest.json").unlink()
    assert describe(root)["missing_windows"] == []
    gone = ["train-00000", "train-00002", "train-00003", "train-00004", "heldout-00001"]
    for name in gone:
        (root / f"shards/{name}.json").unlink()
    facts = describe(root)
    assert facts["state"] == "unfinished"
    assert facts["missing_windows"] == ["heldout 1", "train 0", "train 2 to 4"]
    assert facts["finished_rows"]["train"] == facts["rows"]["train"] - 4 * 512
    assert facts["finished_rows"]["heldout"] == 512
    assert "digest" not in facts
    with pytest.raises(NotFoundError, match="is no gsae store"):
        describe(tmp_path)


def test_describing_opens_no_array(store: Store, tmp_path: Path) -> None:
    for name in ("manifest.json", "plan.json"):
        (tmp_path / name).write_bytes((store.path / name).read_bytes())
    assert describe(tmp_path) == describe(store.path)
    assert open_store(tmp_path).digest == store.digest
