"""A store and SAEs written by format version 1.0: they are never written again, and must be read unchanged."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gsae.store import open_store, verify
from gsae.train import load_sae

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"


def digest_of(rows: Iterable[Tensor]) -> str:
    """Return the sha256 of the bits of bfloat16 rows."""
    return hashlib.sha256(b"".join(x.contiguous().view(torch.int16).numpy().tobytes() for x in rows)).hexdigest()


def test_the_golden_store_is_good() -> None:
    store = open_store(GOLDEN / "store")
    assert store.digest == "156e4dc71c90462148610f830d02a7377036c437cdfeb2f1ac8564f7c9fa18f2"
    assert verify(store, deep=True) == []


def test_its_rows_are_the_same() -> None:
    site = open_store(GOLDEN / "store").site("mlp.1")
    assert digest_of([site[:]]) == "7d4623f33d74ac6bcb2f36dbb2e9f264392a49421b76f7b223adf3bc218247cf"


def test_its_batches_come_in_the_same_order() -> None:
    batches = open_store(GOLDEN / "store").site("mlp.1").batches(50, seed=1, epochs=2, mix=2, open_windows=2)
    assert digest_of(batches) == "c6eae88094f72e57c3a4ec33a21a37c829aa5ea6c35de0fb014ddda02bf99beb"


@pytest.mark.parametrize(
    ("name", "l0", "l1", "start"),
    [
        ("gated-w12-l1_0.05-seed0", [5, 9], [6.176926612854004, 7.978404521942139], -2.67098331451416),
        ("relu-w12-l1_0.05-seed0", [5, 9], [6.1871867179870605, 7.983111381530762], -2.674267053604126),
    ],
)
def test_the_golden_saes_compute_the_same(name: str, l0: list[int], l1: list[float], start: float) -> None:
    sae = load_sae(GOLDEN / "saes" / name)
    f = sae.encode(torch.linspace(-2, 2, 16).reshape(2, 8))
    assert (f > 0).sum(1).tolist() == l0
    assert f.sum(1).tolist() == pytest.approx(l1, rel=1e-5)
    assert float(sae.decode(f)[0, 0]) == pytest.approx(start, rel=1e-5)
