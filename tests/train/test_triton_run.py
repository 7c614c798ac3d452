"""A whole run by Triton's steps, interpreted without a GPU: it learns what a CPU's run learns, and resumes exactly."""

import signal
from pathlib import Path

import pytest
import torch

from gsae.errors import InterruptedRun, UsageError
from gsae.store import Store
from gsae.tests.support.devices import TRITON_DEVICE as DEVICE
from gsae.train import Event, Progress, RunConfig, load_sae, parse_sae, train
from gsae.train.step import triton_bank

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def settings(**changed: object) -> RunConfig:
    usual = {
        "site": "mlp.1", "steps": 8, "batch_size": 16, "log_every": 2, "saes": parse_sae("gated width=6 l1=.1,.4"),
        "device": str(DEVICE), "kernels": "triton", "sparse_share": 0.9, "threads": 1, "lr": 0.01, "resample_at": (5,),
        "resample_silent_rows": 32,
    }  # fmt: skip
    return RunConfig(**(usual | changed))  # type: ignore[arg-type]


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_a_run_learns_what_a_cpu_learns_and_ends_the_same_however_it_was_stopped(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_bank, "LOOK_EVERY", 2)
    site, paths = tiny_store.site("mlp.1"), list[object]()

    def watch(event: Event) -> None:
        if isinstance(event, Progress):
            paths.extend(line["path"] for line in event.metrics)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.step == 4:
            signal.raise_signal(signal.SIGTERM)

    train(site, settings(), tmp_path / "whole", watch)
    assert "sparse" in paths
    with pytest.raises(InterruptedRun):
        train(site, settings(), tmp_path / "stopped", stop)
    train(site, settings(), tmp_path / "stopped")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")

    train(site, settings(kernels=None, sparse_share=None, device="cpu"), tmp_path / "plain")
    for name in ("gated-w6-l1_0.1-seed0", "gated-w6-l1_0.4-seed0"):
        own, plain = (load_sae(tmp_path / run / "saes" / name).params for run in ("whole", "plain"))
        for key, values in vars(plain).items():
            torch.testing.assert_close(getattr(own, key), values, rtol=1e-3, atol=1e-4)


def test_triton_is_refused_where_it_cannot_run(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match="--kernels triton needs a CUDA GPU"):
        train(tiny_store.site("mlp.1"), settings(device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
