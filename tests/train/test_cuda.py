"""On a GPU: harvested rows are those of the model, a step is that of autograd, a stopped run ends in the same bytes.

Everything here needs a CUDA device and is skipped without one; the same claims are tested on the CPU elsewhere.
"""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gsae.errors import InterruptedRun
from gsae.harvest import HarvestConfig, harvest
from gsae.store import Store
from gsae.tests.support.dense_gradients import assert_gradients_equal
from gsae.tests.support.params import normal, random_params
from gsae.train import Event, Progress, RunConfig, parse_sae, train
from gsae.train.run.snapshot import Snapshot
from gsae.train.step.fast_bank import FastBank

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("arch", ["gated", "relu"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_on_a_gpu_equal_autograd_in_float64(arch: str, dtype: torch.dtype, within: float) -> None:
    start = [random_params(arch, 64, 203, seed=seed, dtype=dtype) for seed in range(3)]
    centre = torch.linspace(-0.2, 0.3, 64, dtype=dtype)
    bank = FastBank(start, centre.cuda(), dtype, "cuda")
    l1 = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64, device="cuda")
    on_gpu = [type(one)(**{name: tensor.cuda() for name, tensor in vars(one).items()}) for one in start]

    assert bank.paths == ("dense",) * 3
    assert_gradients_equal(on_gpu, normal(129, 64, dtype=dtype).cuda(), l1, bank, within)


def test_batches_on_a_gpu_are_those_on_the_cpu(tiny_store: Store) -> None:
    site = tiny_store.site("mlp.1")
    with site.batches(96, epochs=1) as here, site.batches(96, epochs=1, device="cuda") as there:
        pairs = list(zip(here, (batch.cpu() for batch in there), strict=True))
    assert len(pairs) > 50
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_snapshot_is_the_state_when_it_was_taken_and_is_not_waited_for() -> None:
    weights, snapshot = torch.ones(64 << 20, device="cuda"), Snapshot()
    for value in (1.0, 2.0):
        weights.fill_(value)
        copy = snapshot.take({"w": weights})["w"]
        weights.fill_(-1.0)  # queued behind the copy
        snapshot.wait()
        assert copy.is_pinned()
        assert bool((copy == value).all())


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("steps", ["plain", "fused", "sparse", "graph"])
def test_a_run_on_a_gpu_learns_and_ends_the_same_however_it_was_stopped(
    tiny_store: Store, tmp_path: Path, precision: str, steps: str
) -> None:
    saes = parse_sae("gated width=48 l1=.1,.3") + parse_sae("relu width=40 l1=.1") + parse_sae("gated width=16 l1=.2")
    config = RunConfig(
        site="mlp.1", steps=120, batch_size=96, log_every=10, saes=saes, device="cuda", precision=precision, threads=1,
        resample_at=(60,), kernels="plain" if steps == "plain" else "triton", cuda_graph=steps == "graph",
        sparse_share=0.9 if steps in ("sparse", "graph") else 0.0,
    )  # fmt: skip
    site, seen = tiny_store.site("mlp.1"), list[Progress]()

    def watch(event: Event) -> None:
        if isinstance(event, Progress):
            seen.append(event)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.step == 70:
            signal.raise_signal(signal.SIGTERM)

    train(site, config, tmp_path / "whole", watch)
    with pytest.raises(InterruptedRun):
        train(site, config, tmp_path / "stopped", stop)
    train(site, config, tmp_path / "stopped")

    assert seen[-1].metrics[0]["loss"] < 0.7 * seen[0].metrics[0]["loss"]
    assert _bytes(tmp_path / "stopped") == _bytes(tmp_path / "whole")
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_a_run_on_a_gpu_goes_on_from_what_was_written_while_it_trained(tiny_store: Store, tmp_path: Path) -> None:
    saes = parse_sae("gated width=48 l1=.1,.3") + parse_sae("relu width=40 l1=.1")
    config = RunConfig(
        site="mlp.1", steps=120, batch_size=96, log_every=10, saes=saes, device="cuda", threads=1, checkpoint_every=8
    )
    site = tiny_store.site("mlp.1")

    def break_off(event: Event) -> None:
        if isinstance(event, Progress) and event.step == 70:
            raise KeyError

    train(site, config, tmp_path / "whole")
    with pytest.raises(KeyError):
        train(site, config, tmp_path / "broken", break_off)
    train(site, config, tmp_path / "broken")
    assert _bytes(tmp_path / "broken") == _bytes(tmp_path / "whole")


def _bytes(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_harvested_on_a_gpu_are_the_models_own(tiny_llama: Path, tmp_path: Path, dtype: str) -> None:
    config = HarvestConfig(
        model=str(tiny_llama), dataset="builtin:pydoc", sites=("resid.1",), rows=3000, context_size=64, batch_size=8,
        window_rows=1024, dtype=dtype, codec="planes" if dtype == "bfloat16" else "zstd", device="cuda", heldout=0.05,
    )  # fmt: skip
    store = harvest(config, tmp_path / "store")
    assert store is not None
    assert _bytes(store.path) == _bytes(_again(config, tmp_path / "again"))

    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=getattr(torch, dtype)).cuda().eval()
    site, tokens = store.site("resid.1"), store.tokens()
    rows, sources = site[np.arange(site.rows)], site.sources(np.arange(site.rows))
    with torch.inference_mode():
        hidden = model(torch.from_numpy(tokens).cuda().long(), output_hidden_states=True).hidden_states[2].float().cpu()
    expected = hidden.flatten(0, 1)[torch.from_numpy(sources)]
    # Another batch size takes other kernels on a GPU, so equality is to rounding.
    within = 1e-5 if dtype == "float32" else 2e-2
    assert (torch.as_tensor(rows).float() - expected).abs().max() <= within * expected.abs().max()


def _again(config: HarvestConfig, out: Path) -> Path:
    store = harvest(config, out)
    assert store is not None
    return store.path
