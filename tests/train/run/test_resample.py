"""Silent latents get new directions: of which inputs, how often they fire afterwards, with which optimiser state."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gsae.errors import UsageError
from gsae.store import Store
from gsae.tests.support.params import random_params
from gsae.train import Progress, Resampled, RunConfig, parse_sae, train
from gsae.train.architectures.base import Params
from gsae.train.architectures.registry import ARCHITECTURES
from gsae.train.run.computing import computing_with
from gsae.train.run.group import Group
from gsae.train.run.inputs import Inputs
from gsae.train.run.lr_schedule import recovery
from gsae.train.run.resample import resampled
from gsae.train.step.adam import Adam
from gsae.train.step.autograd_bank import AutogradBank
from gsae.train.step.fast_bank import FastBank

D_IN, D_SAE = 16, 40
TRAINED = [kind for kind in sorted(ARCHITECTURES) if not ARCHITECTURES[kind].FROZEN]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with computing_with(1):
        yield


def some_inputs(rows: int = 500, seed: int = 3) -> Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed)) / 4


def with_dead(kind: str, dead: int = 5) -> tuple[Params, Tensor]:
    sae = random_params(kind, D_IN, D_SAE, dtype=torch.float32)
    getattr(sae, sae.GATE)[:dead] = -100
    return sae, torch.arange(D_SAE) < dead


@pytest.mark.parametrize("kind", TRAINED)
def test_a_silent_latent_reads_and_writes_an_input_and_fires_as_often_as_the_median_live_one(kind: str) -> None:
    (sae, silent), z = with_dead(kind), some_inputs()
    found = resampled(sae, silent, z, 0.1, seed=1, zero_bias=False)
    assert found is not None
    assert found.latents.tolist() == [0, 1, 2, 3, 4]
    assert sorted(found.values) == sorted(set(vars(sae)) - {"b_dec"})
    decoder, encoder = found.values["W_dec"], found.values["W_enc"]
    directions = torch.nn.functional.normalize(z - sae.b_dec, dim=1)
    nearest = (decoder @ directions.T).max(1)
    torch.testing.assert_close(nearest.values, torch.ones(5))
    assert len(set(nearest.indices.tolist())) == 5  # drawn without putting back
    live_norm = sae.W_enc[~silent].norm(dim=1).mean()
    torch.testing.assert_close(encoder, decoder * 0.2 * live_norm)
    fires = lambda p: (p.encode(z) > 0).double().mean(0)  # noqa: E731
    new = {name: tensor.clone() for name, tensor in vars(sae).items()}
    for name, values in found.values.items():
        new[name][found.latents] = values
    after = fires(ARCHITECTURES[kind](**new))
    torch.testing.assert_close(after[silent], fires(sae)[~silent].median().expand(5), rtol=0, atol=2 / len(z))


def test_with_resample_bias_zero_the_gate_bias_is_zero_as_in_bricken_et_al() -> None:
    (sae, silent), z = with_dead("gated"), some_inputs()
    found = resampled(sae, silent, z, 0.1, seed=1, zero_bias=True)
    assert found is not None
    assert not found.values["b_gate"].any()


def test_inputs_are_drawn_in_proportion_to_their_squared_loss() -> None:
    sae, silent = with_dead("relu", dead=1)
    z = torch.cat([some_inputs(3), 3 * some_inputs(3, seed=4)])
    weights = sae.losses(z, 0.1).double().square()
    expected = (weights / weights.sum()).tolist()
    directions = torch.nn.functional.normalize(z - sae.b_dec, dim=1)
    counts = torch.zeros(6)
    for seed in range(400):
        found = resampled(sae, silent, z, 0.1, seed=seed, zero_bias=True)
        assert found is not None
        counts[(found.values["W_dec"] @ directions.T).argmax()] += 1
    assert counts.tolist() == pytest.approx([400 * share for share in expected], abs=5 * 400**0.5 / 2)


def test_rows_over_the_norm_limit_are_not_drawn() -> None:
    sae, silent = with_dead("gated", dead=20)
    z = torch.cat([some_inputs(30), 8 * some_inputs(30, seed=4)])
    limit = float(z[:30].norm(dim=1).max()) * 1.01
    found = resampled(sae, silent, z, 0.1, seed=0, zero_bias=False, norm_limit=limit)
    assert found is not None
    nearest = (found.values["W_dec"] @ torch.nn.functional.normalize(z - sae.b_dec, dim=1).T).max(1)
    assert (nearest.indices < 30).all()
    everywhere = resampled(sae, silent, z, 0.1, seed=0, zero_bias=False)
    assert everywhere is not None
    assert not torch.equal(everywhere.values["W_dec"], found.values["W_dec"])
    assert resampled(sae, silent, z, 0.1, seed=0, zero_bias=False, norm_limit=1e-9) is None


def test_with_few_inputs_few_latents_are_resampled_and_without_a_loss_none() -> None:
    sae, silent = with_dead("gated", dead=20)
    found = resampled(sae, silent, some_inputs(7), 0.1, seed=0, zero_bias=False)
    assert found is not None
    assert len(found.latents) == 7
    perfect = sae.b_dec.expand(4, -1)
    shut = ARCHITECTURES["gated"](**(vars(sae) | {"b_gate": torch.full((D_SAE,), -100.0)}))
    assert resampled(shut, silent, perfect, 0.1, seed=0, zero_bias=False) is None


@pytest.mark.parametrize(
    "bank_type",
    [partial(FastBank, path="dense"), partial(FastBank, path="sparse"), AutogradBank],
    ids=["dense", "sparse", "any"],
)
@pytest.mark.parametrize("kind", ["gated", "relu"])
def test_a_reset_latent_restarts_its_bias_correction_so_its_first_step_is_no_longer_than_the_rate(
    kind: str, bank_type: Any
) -> None:
    start = [random_params(kind, D_IN, D_SAE, seed, torch.float32) for seed in range(2)]
    bank = bank_type(start, torch.zeros(D_IN), torch.float32)
    l1, lr = torch.tensor([0.1, 0.1], dtype=torch.float64), torch.tensor([1e-3, 1e-3])
    z = some_inputs(64)
    for step in range(1000, 1006):
        bank.step(z, l1, Adam(lr, 0.999, 1e-8, step, False))
    latents = torch.tensor([1, 7])
    moments = {n: t.clone() for n, t in bank.state().items() if n.endswith("second_moment")}
    bank.reset(1, latents)
    for name, before in moments.items():
        now = bank.state()[name]
        assert torch.equal(now[0], before[0]), name
        if not name.startswith("b_dec"):
            kept = torch.ones(D_SAE, dtype=torch.bool)
            kept[latents] = False
            assert torch.equal(now[1][kept], before[1][kept])
            assert not now[1][latents].any()
    before = bank.params["W_enc"][1].clone()
    bank.step(z, l1, Adam(lr, 0.999, 1e-8, 1006, False))
    moved = (bank.params["W_enc"][1] - before).abs().amax(1)
    # A first step of Adam is as long as the rate; without its own bias correction it would be 31.6 times that.
    torch.testing.assert_close(moved[latents], torch.full((2,), 1e-3), rtol=0.01, atol=0)


@pytest.mark.parametrize(("settings", "sparse"), [({}, False), ({}, True), ({"clip_grad_norm": 10.0}, False)])
def test_resampling_changes_silent_latents_and_nothing_else(
    tiny_store: Store, settings: dict[str, Any], sparse: bool
) -> None:
    site = tiny_store.site("mlp.1")
    run = config(**settings).resolved(device="cpu", threads=1)
    group = Group(0, run.groups()[0], run, Inputs.of(site, run))
    if sparse:
        assert isinstance(group.bank, FastBank)
        group.bank.fixed = "sparse"
        group.bank.sparse.fill_(True)
    with site.batches(96, epochs=None) as batches:
        for _ in range(3):
            x = group.inputs.scaled(next(batches)) - group.inputs.centre
            group.advance(x, x.square().sum(dtype=torch.float64), batches.state_dict())
    group.silent[1, 5:9] = 10**6
    before = {name: tensor.clone() for name, tensor in group.bank.state().items()}
    assert group.resample(group.inputs.to_resample_from(run, 3)) == {"gated-w48-l1_0.3-seed0": 4}
    changed = torch.zeros(2, 48, dtype=torch.bool)
    changed[1, 5:9] = True
    for name, tensor in group.bank.state().items():
        if tensor.shape[:2] == changed.shape:
            assert torch.equal(tensor[~changed], before[name][~changed]), name
    assert not torch.equal(group.bank.params["W_dec"][1, 5:9], before["W_dec"][1, 5:9])
    assert group.silent[1, 5:9].tolist() == [0] * 4
    assert group.resampled.tolist() == [-1, 3]
    group.advance(x, x.square().sum(dtype=torch.float64), {})
    norms = group.bank.params["W_dec"].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-5, atol=0)


def config(**settings: Any) -> RunConfig:
    usual = {"site": "mlp.1", "steps": 30, "batch_size": 96, "log_every": 1, "threads": 1, "device": "cpu",
             "lr_warm_up_steps": 0, "lr_decay_steps": 0, "resample_at": (8, 16), "resample_silent_rows": 1,
             "resample_warm_up_steps": 6, "saes": parse_sae("gated width=48 l1=.1,.3")}  # fmt: skip
    return RunConfig(**(usual | settings))


def test_after_resampling_the_rate_drops_to_a_tenth_and_returns_by_a_cosine(tiny_store: Store, tmp_path: Path) -> None:
    events: list[Any] = []
    saes = parse_sae("gated width=48 l1=.1,30 lr=0.5")  # the second kills latents
    settings = config(saes=saes, l1_warm_up_steps=0, resample_at=(12,), resample_silent_rows=96, row_clip=False,
                      on_divergence="continue")  # fmt: skip
    train(tiny_store.site("mlp.1"), settings, tmp_path / "run", events.append)
    name = "gated-w48-l1_30-seed0"
    assert name in [event.sae for event in events if isinstance(event, Resampled) and event.step == 12]
    rates = {e.step: m["lr"] for e in events if isinstance(e, Progress) for m in e.metrics if m["sae"] == name}
    # The line of step 12 is written after the resampling, and says what comes next.
    assert [rates[step] for step in (11, 12, 15, 18, 19)] == pytest.approx([0.5, 0.05, 0.275, 0.5, 0.5])
    run = config().resolved(device="cpu", threads=1)
    assert recovery(run, 40, torch.tensor([-1, 40, 43 - 6])).tolist() == pytest.approx([1.0, 0.1, 0.55])


def test_by_default_silent_rows_are_half_the_smallest_gap_between_resampling_steps() -> None:
    run = config(resample_at=(10, 16), resample_silent_rows=None).resolved(device="cpu", threads=1)
    assert run.resample_silent_rows == 3 * 96


@pytest.mark.parametrize("steps", [(16, 8), (8, 8), (30,), (0,)])
def test_steps_out_of_order_or_beyond_the_run_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="ascending steps between 0 and 30"):
        config(resample_at=steps)


def test_rows_to_draw_from_follow_from_the_step_and_are_train_rows(tiny_store: Store) -> None:
    site = tiny_store.site("mlp.1")
    inputs = Inputs.of(site, config())
    one, again, other = (inputs.to_resample_from(config(), step) for step in (8, 8, 16))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    rows = site[:].float() * inputs.scale
    assert len(one) == site.rows
    torch.testing.assert_close(one.sum(0), rows.sum(0), rtol=1e-3, atol=1e-2)


def test_metrics_have_the_path_and_held_out_metrics(tiny_store: Store, tmp_path: Path) -> None:
    train(tiny_store.site("mlp.1"), config(log_every=5, eval_every=10, resample_at=()), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} <= {"dense", "sparse"}
    assert sorted({line["step"] for line in lines if "heldout" in line}) == [10, 20, 30]
    last = lines[-1]["heldout"]
    assert last["rows"] == min(2048, tiny_store.site("mlp.1", "heldout").rows)
    from gsae.train import load_sae

    sae = load_sae(tmp_path / "run" / "saes" / lines[-1]["sae"])
    x = tiny_store.site("mlp.1", "heldout")[: last["rows"]].double()
    f = sae.encode(x.float())
    x_hat = sae.decode(f).double()
    assert last["l0"] == pytest.approx(float((f > 0).sum() / len(x)), rel=1e-3)
    spread = (x - x.mean(0)).square().sum()
    assert last["explained_variance"] == pytest.approx(float(1 - (x - x_hat).square().sum() / spread), rel=1e-4)
    assert last["gamma"] == pytest.approx(float(x_hat.square().sum() / (x_hat * x).sum()), rel=1e-4)
    assert last["mse"] == pytest.approx(float((x - x_hat).square().sum(1).mean()), rel=1e-4)
