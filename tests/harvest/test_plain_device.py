"""A harvest on a device without float64, unsigned types, streams and pinned memory, such as Apple's GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gsae.errors import UsageError
from gsae.harvest import HarvestConfig, harvest
from gsae.harvest.model.devices import check_device
from gsae.harvest.row_mover import HostCopier, Mover, PinnedCopier, PlainCopier, copier_for
from gsae.tests.support.children import files
from gsae.tests.support.plain_device import RefusingCalls
from gsae.tests.support.selection import mostly_slow


class DeviceRows:
    """Rows on a device that only lets them be copied to the host."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def cpu(self) -> torch.Tensor:
        return self._rows.clone()

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of rows on the device")


def test_rows_are_copied_plainly_and_nothing_else_is_done_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        assert not pin_memory
        return zeros(*args, **kwargs)

    zeros: Callable[..., torch.Tensor] = torch.zeros
    monkeypatch.setattr(torch, "zeros", unpinned)
    monkeypatch.setattr(torch.cuda, "Stream", None)
    rows = torch.randn(40, 8, dtype=torch.bfloat16)
    buffer = {"resid.0": np.zeros((40, 8), np.uint16)}
    with Mover(PlainCopier(torch.device("cpu"))) as mover:
        for part in range(4):
            here = slice(10 * part, 10 * part + 10)
            mover.put({"resid.0": DeviceRows(rows[here])}, lambda: buffer, np.arange(40)[here], mover.mark())  # type: ignore[dict-item]
        mover.drain()
    assert np.array_equal(buffer["resid.0"], rows.view(torch.uint16).numpy())


def test_each_kind_of_device_has_its_copier() -> None:
    kinds = {name: type(copier_for(torch.device(name), 1)) for name in ("cpu", "cuda", "mps", "xpu")}
    assert kinds == {"cpu": HostCopier, "cuda": PinnedCopier, "mps": PlainCopier, "xpu": PlainCopier}


@pytest.mark.parametrize("dtype", mostly_slow(["bfloat16", "float16"], "bfloat16"))
def test_passes_use_nothing_that_the_device_lacks(tiny_llama: Path, tmp_path: Path, dtype: Any) -> None:
    config = HarvestConfig(
        model=str(tiny_llama), dataset="builtin:pydoc", sites=("resid.1", "mlp.0", "attn.1"), rows=500,
        context_size=64, window_rows=512, heldout=0.01, dtype=dtype, device="cpu",
    )  # fmt: skip
    with RefusingCalls():
        harvest(config, tmp_path / "stub")
    harvest(config, tmp_path / "usual")
    assert files(tmp_path / "stub") == files(tmp_path / "usual")


def test_auto_is_apples_gpu_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("auto").type in ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match="Device 'mps' cannot be used"):
        check_device("auto")
