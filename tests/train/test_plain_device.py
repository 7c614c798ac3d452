"""On a device without float64, streams and pinned memory, such as Apple's GPU: the plain path, and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.store import Store
from gsae.store.read.batches_copied import CopiedBatches
from gsae.tests.support.params import normal, random_params
from gsae.tests.support.plain_device import RefusedError, RefusingCalls, RefusingDevice
from gsae.tests.support.small_runs import config, run
from gsae.train import Progress
from gsae.train.run.computing import device_of
from gsae.train.run.config import ResolvedRun
from gsae.train.run.group import Group
from gsae.train.run.inputs import Inputs
from gsae.train.step import adam_plain, dense_plain, wide
from gsae.train.step.adam import Adam
from gsae.train.step.autograd_bank import AutogradBank
from gsae.train.step.fast_bank import FastBank

META = torch.device("meta")


@pytest.fixture
def _meta_lacks_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "WITHOUT_FLOAT64", ("meta",))


def test_the_stub_refuses_float64_on_the_device_alone() -> None:
    with RefusingDevice():
        torch.ones(2).double()
        with pytest.raises(RefusedError):
            torch.ones(2, device="meta").double()


@pytest.mark.usefixtures("_meta_lacks_float64")
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["gated", "relu"])
def test_a_step_uses_nothing_that_the_device_lacks(operands: torch.dtype, arch: str) -> None:
    start = [random_params(arch, 16, 40, seed=seed, dtype=torch.float32) for seed in range(2)]
    made = FastBank(start, torch.zeros(16), operands, META)
    x, l1 = normal(32, 16, dtype=torch.float32).to(META), torch.ones(2, device=META)
    with RefusingDevice():
        sums = made.step(x, l1, Adam(torch.ones(2, device=META), 0.999, 6e-10, 1, True))
    assert sums.l0.dtype == sums.squared_error.dtype == torch.float32
    assert (made.dense_passes, made.adam_steps, made.screened) == (dense_plain, adam_plain, False)
    assert made.paths == ("dense", "dense")


@pytest.mark.parametrize("arch", ["gated", "relu"])
def test_a_step_by_autograd_too(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    """On the CPU, because the stub has no autocast: nothing in it is float64."""
    monkeypatch.setattr(wide, "WITHOUT_FLOAT64", ("cpu",))
    start = [random_params(arch, 16, 40, seed=seed, dtype=torch.float32) for seed in range(2)]
    made, x = AutogradBank(start, torch.zeros(16), torch.float32), normal(32, 16, dtype=torch.float32)
    with RefusingCalls():
        sums = made.step(x, torch.ones(2), Adam(torch.ones(2), 0.999, 6e-10, 1, True))
    assert sums.squared_error.dtype == torch.float32


@pytest.mark.usefixtures("_meta_lacks_float64")
def test_what_a_group_counts_is_not_float64_there(tiny_store: Store) -> None:
    settings = config(on_divergence="continue")
    resolved: ResolvedRun = settings.resolved(device="meta", threads=1, ranks=1)
    inputs = replace(Inputs.of(tiny_store.site("mlp.1"), settings), device=META)
    with RefusingDevice():
        group = Group(0, resolved.groups()[0], resolved, inputs)
        x = inputs.scaled(tiny_store.site("mlp.1")[:96]) - inputs.centre.to(META)
        group.advance(x, x.square().sum(dtype=wide.wide(x.device)), {})
    assert group.totals.dtype == group.seen.dtype == torch.float32


def figures(store: Store, out: Path, **settings: Any) -> list[dict[str, Any]]:
    return [line for event in run(store, out, **settings) if isinstance(event, Progress) for line in event.metrics]


@pytest.mark.parametrize("settings", [{"clip_grad_norm": 1e6, "resample_at": (9,)}, {}])
def test_a_whole_run_with_float32_sums_has_the_same_metrics(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    usual = figures(tiny_store, tmp_path / "usual", **settings)
    monkeypatch.setattr(wide, "WITHOUT_FLOAT64", ("cpu",))
    plain = figures(tiny_store, tmp_path / "plain", **settings)
    assert len(usual) == len(plain) > 8
    for one, other in zip(usual, plain, strict=True):
        for name in ("loss", "l0", "mse", "explained_variance"):
            assert other[name] == pytest.approx(one[name], rel=2e-3), name


def test_the_bias_correction_keeps_its_digits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    adam, born = Adam(torch.ones(1), 0.999, 6e-10, 10_000, True), torch.tensor([[0, 5000, 9990, 9999]])
    exact = adam.correction(born)
    monkeypatch.setattr(wide, "WITHOUT_FLOAT64", ("cpu",))
    found = adam.correction(born)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_copied_batches_are_those_of_the_cpu_from_any_position(tiny_store: Store) -> None:
    site = tiny_store.site("mlp.1")
    with site.batches(96) as usual, site.batches(96, device="meta") as there:
        whole = list(usual)
        assert [batch.shape for batch in there] == [batch.shape for batch in whole]
    with site.batches(96) as first:
        copied = CopiedBatches(first._reading, None, torch.device("cpu"))
        taken = [next(copied) for _ in range(3)]
        rest = CopiedBatches(first._reading, copied.state_dict(), torch.device("cpu"))
        assert all(torch.equal(a, b) for a, b in zip([*taken, *rest], whole, strict=True))
        copied.close()


def test_auto_is_apples_gpu_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of(config(device="auto")) == "mps"
    assert device_of(config(device="cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(config(device="auto")) == "cuda"
