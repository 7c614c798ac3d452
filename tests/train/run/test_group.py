"""A group of SAEs by itself: what it counts, what it measures, and how its steps are taken."""

from typing import Any

import pytest
import torch

from gsae.store import Site, Store
from gsae.train import RunConfig, parse_sae
from gsae.train.run.computing import computing_with
from gsae.train.run.group import Group
from gsae.train.run.inputs import Inputs
from gsae.train.run.lr_schedule import l1_factor, lr_factor
from gsae.train.step.autograd_bank import AutogradBank
from gsae.train.step.fast_bank import FastBank


def config(**settings: Any) -> RunConfig:
    usual = {"site": "mlp.1", "steps": 30, "batch_size": 96, "log_every": 7, "threads": 1, "device": "cpu",
             "saes": parse_sae("gated width=48 l1=.1,.3")}  # fmt: skip
    return RunConfig(**(usual | settings))


def first_group(site: Site, **settings: Any) -> Group:
    run = config(**settings).resolved(device="cpu", threads=1)
    return Group(0, run.groups()[0], run, Inputs.of(site, run))


def advance(group: Group, rows: torch.Tensor, position: dict[str, int]) -> None:
    x = group.inputs.scaled(rows) - group.inputs.centre
    group.advance(x, x.square().sum(dtype=torch.float64), position)


def test_a_checkpoint_holds_every_counter(tiny_store: Store) -> None:
    site = tiny_store.site("mlp.1")
    before, after = first_group(site), first_group(site)
    with site.batches(96, epochs=None) as batches:
        for _ in range(5):
            advance(before, next(batches), batches.state_dict())
    before.stopped[1] = 3
    before.silent[0, 2] = 17
    before.resampled[0] = 4
    after.restore(before.checkpoint(0))
    for name in ("silent", "stopped", "totals", "seen", "resampled"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert (after.step, after.reader, after.failed()) == (5, before.reader, {"gated-w48-l1_0.3-seed0": 3})
    assert before.lines(None) == after.lines(None)


def test_reading_the_metrics_does_not_change_them_and_resetting_begins_new_sums(tiny_store: Store) -> None:
    site = tiny_store.site("mlp.1")
    group = first_group(site)
    with site.batches(96, epochs=None) as batches:
        advance(group, next(batches), batches.state_dict())
        first = group.lines(None)
        assert group.lines(None) == first
        group.reset_totals()
        advance(group, next(batches), batches.state_dict())
    assert group.seen[0] == 96
    assert group.lines(None)[0].loss != first[0].loss


def test_the_settings_of_a_run_decide_how_its_steps_are_taken(tiny_store: Store) -> None:
    site = tiny_store.site("mlp.1")
    plain, screened, clipped = (
        first_group(site, **s).bank for s in ({}, {"screening": True}, {"clip_grad_norm": 1e-3})
    )
    assert isinstance(plain, FastBank)
    assert isinstance(screened, FastBank)
    assert (plain.screened, screened.screened) == (False, True)
    assert isinstance(clipped, AutogradBank)


def test_clipping_shortens_the_steps(tiny_store: Store) -> None:
    site = tiny_store.site("mlp.1")
    moments = []
    for clip in (1e-3, 1e3):
        group = first_group(site, clip_grad_norm=clip)
        with site.batches(96, epochs=None) as batches:
            advance(group, next(batches), batches.state_dict())
        moments.append(sum(float(t[0].sum()) for n, t in group.bank.state().items() if n.endswith("second_moment")))
    # A second moment after one step is (1 - beta2) * g^2, and all g^2 together are at most clip^2; W_dec's gradient is
    # projected after clipping.
    assert moments[0] <= 1.001 * 0.001 * 1e-6
    assert moments[1] > 10 * moments[0]


def test_the_first_reconstruction_is_no_larger_than_its_input_whatever_the_width(tiny_store: Store) -> None:
    sizes = {}
    for start in ("scaled", "unit"):
        group = first_group(tiny_store.site("mlp.1"), encoder_start=start, saes=parse_sae("gated width=512 l1=.1"))
        with tiny_store.site("mlp.1").batches(96) as batches:
            z = group.inputs.scaled(next(batches))
        sae = group.params(0)
        sizes[start] = float((sae.decode(sae.encode(z)) - sae.b_dec).norm() / (z - sae.b_dec).norm())
    assert sizes["unit"] == pytest.approx(512 / 64, rel=0.2)  # d_sae / (2 d_in)
    assert sizes["scaled"] == pytest.approx(1, rel=0.2)
    narrow = first_group(tiny_store.site("mlp.1"), saes=parse_sae("gated width=48 l1=.1"))
    assert torch.equal(narrow.params(0).W_enc, narrow.params(0).W_dec)


def test_rates_rise_and_fall_linearly() -> None:
    run = config(steps=100, lr_warm_up_steps=10, lr_decay_steps=20, l1_warm_up_steps=40).resolved(
        device="cpu", threads=1
    )
    steps = (1, 5, 10, 50, 81, 91, 100)
    assert [lr_factor(run, step) for step in steps] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.05])
    assert [l1_factor(run, step) for step in (1, 20, 40, 100)] == pytest.approx([1 / 40, 0.5, 1, 1])


def test_a_latent_is_dead_while_silent_on_all_rows_so_far_or_an_epochs(tiny_store: Store) -> None:
    site = tiny_store.site("mlp.1")
    group = first_group(site)
    group.bank.params["b_gate"][0, 7] = -1e9
    with site.batches(96, epochs=None) as batches, computing_with(1):
        while 96 * group.step < site.rows:
            advance(group, next(batches), batches.state_dict())
            assert group.dead_rows == min(96 * group.step, site.moments.within(10.0).rows)
            assert group.dead() == [1 / 48, 0.0]
    group.silent[0, 7] = group.dead_rows - 1
    assert group.dead() == [0.0, 0.0]
