"""SAEs that stop learning: by which rules, what is done with them, and that a resume does the same."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.errors import InterruptedRun
from gsae.evaluate import evaluate, report
from gsae.store import Store
from gsae.tests.support.children import files
from gsae.tests.support.command import gsae
from gsae.tests.support.selection import mostly_slow
from gsae.train import Checkpointed, Diverged, Event, Finished, MetricsLine, RunConfig, load_sae, parse_sae, train
from gsae.train.run.divergence import NOT_FINITE, REASONS, RETRY_LR, Divergence
from gsae.train.run.group import Group
from gsae.train.run.inputs import Inputs

GOOD = {"step": 10, "sae": "a", "loss": 1.0, "explained_variance": 0.5, "dead": 0.1}
WILD, CALM = "gated width=256 l1=.1 lr=1", "gated width=256 l1=.1 lr=2e-3"
WILD_NAME, CALM_NAME = "gated-w256-l1_0.1-seed0-lr_1", "gated-w256-l1_0.1-seed0-lr_0.002"


def line(**changed: Any) -> MetricsLine:
    return MetricsLine.model_validate(GOOD | changed)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, ""),
        ({"loss": 1.99}, ""),
        ({"loss": 2.01}, "loss"),
        ({"explained_variance": 0.41}, ""),
        ({"explained_variance": 0.39}, "variance"),
        ({"explained_variance": None}, ""),
        ({"dead": 0.29}, ""),
        ({"dead": 0.31}, "silent"),
        ({"loss": None}, "not finite"),
    ],
)
def test_each_rule_by_itself(changed: dict[str, Any], word: str) -> None:
    known = Divergence(2, {})
    assert known.fault(1, line(), silent_known=True) == 0
    found = REASONS[known.fault(1, line(**changed), silent_known=True)]
    assert (word in found) if word else found == ""
    assert known.fault(0, line(**changed), silent_known=True) in (0, NOT_FINITE)  # the other SAE has no best yet


def test_figures_are_compared_with_the_best_and_silent_latents_only_once_they_are_known() -> None:
    known = Divergence(1, {})
    for loss, variance in ((3.0, 0.2), (1.0, 0.6), (1.9, 0.55)):
        assert known.fault(0, line(loss=loss, explained_variance=variance, dead=0.0), silent_known=False) == 0
    assert known.best[:, 0].tolist() == [1.0, -0.6, torch.inf]
    assert known.fault(0, line(explained_variance=0.6, dead=0.9), silent_known=True) == 0  # the first that is known
    assert "silent" not in REASONS[known.fault(0, line(explained_variance=0.6, dead=1.0), silent_known=True)]
    assert "variance" in REASONS[known.fault(0, line(explained_variance=0.49), silent_known=True)]


def config(saes: tuple[str, ...] = (WILD, CALM), **settings: Any) -> RunConfig:
    usual = {"site": "mlp.1", "steps": 120, "batch_size": 96, "log_every": 6, "threads": 1, "device": "cpu",
             "lr_warm_up_steps": 12, "l1_warm_up_steps": 6, "row_clip": False, "encoder_start": "unit",
             "healthy_every": 12}  # fmt: skip
    return RunConfig(**(usual | settings), saes=tuple(sae for text in saes for sae in parse_sae(text)))


def run(store: Store, out: Path, **settings: Any) -> list[Event]:
    events: list[Event] = []
    train(store.site("mlp.1"), config(**settings), out, events.append)
    return events


def last(out: Path, name: str) -> dict[str, Any]:
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [found for found in lines if found["sae"] == name][-1]


def test_a_diverged_sae_is_stopped_and_its_last_healthy_weights_are_saved_and_say_so(
    tiny_store: Store, tmp_path: Path
) -> None:
    events = run(tiny_store, tmp_path / "run")
    found = [event for event in events if isinstance(event, Diverged)]
    assert [event.sae for event in found] == [WILD_NAME]
    assert (found[0].action, found[0].back_to % 12) == ("stop", 0)
    assert 12 <= found[0].back_to < found[0].step
    assert events[-1] == Finished(step=120, already=False, stopped=(WILD_NAME,))
    noted = load_sae(tmp_path / "run" / "saes" / WILD_NAME).metadata
    assert noted["diverged"] == noted["stopped"] == found[0].step
    assert noted["steps"] == found[0].back_to
    assert noted["rows"] == 96 * found[0].back_to
    assert noted["diverged_because"] == found[0].because
    assert last(tmp_path / "run", WILD_NAME)["stopped"] == found[0].step
    assert last(tmp_path / "run", WILD_NAME)["diverged"] == found[0].step
    # They are the weights of that step, and the other SAE is that of a run without it.
    short = run(tiny_store, tmp_path / "short", steps=found[0].back_to, lr_decay_steps=0, saes=(WILD, CALM))
    assert isinstance(short[-1], Finished)
    same = config().resolved(device="cpu", threads=1).lr_decay_steps
    assert found[0].back_to <= 120 - same  # before the rate falls
    for name, tensor in vars(load_sae(tmp_path / "short" / "saes" / WILD_NAME).params).items():
        torch.testing.assert_close(tensor, getattr(load_sae(tmp_path / "run" / "saes" / WILD_NAME).params, name))
    assert load_sae(tmp_path / "run" / "saes" / CALM_NAME).metadata.get("diverged") is None
    shown = gsae("info", tmp_path / "run").stdout
    assert f"{WILD_NAME} diverged at step {found[0].step}: {found[0].because}; stopped, with its last" in shown
    assert f"{CALM_NAME} diverged" not in shown
    (measured,) = (e for e in evaluate(tmp_path / "run", tiny_store, None, None) if e.sae == WILD_NAME)
    assert (measured.diverged, measured.steps) == (found[0].step, found[0].back_to)
    report([tmp_path / "run"], tmp_path / "report.html")
    assert f"{WILD_NAME} diverged at step {found[0].step} (" in (tmp_path / "report.html").read_text()


def test_with_retry_it_goes_back_with_a_third_of_its_rate_twice_at_most(tiny_store: Store, tmp_path: Path) -> None:
    events = run(tiny_store, tmp_path / "run", on_divergence="retry")
    found = [event for event in events if isinstance(event, Diverged)]
    assert [event.action for event in found][:2] == ["retry", "retry"]
    assert [event.action for event in found][2:] in ([], ["stop"])
    noted = load_sae(tmp_path / "run" / "saes" / WILD_NAME).metadata
    assert noted["retries"] == [{"step": event.step, "back_to": event.back_to} for event in found[:2]]
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {one["step"]: one["lr"] for one in lines if one["sae"] == WILD_NAME}
    assert rates[found[0].step + 6] == pytest.approx(RETRY_LR, rel=1e-6)
    assert load_sae(tmp_path / "run" / "saes" / CALM_NAME).metadata.get("retries") is None


def test_with_continue_it_is_marked_once_and_trained_to_the_end(tiny_store: Store, tmp_path: Path) -> None:
    events = run(tiny_store, tmp_path / "run", on_divergence="continue")
    assert [event.action for event in events if isinstance(event, Diverged)] == ["continue"]
    noted = load_sae(tmp_path / "run" / "saes" / WILD_NAME).metadata
    assert (noted["steps"], noted.get("stopped")) == (120, None)
    assert noted["diverged"] == last(tmp_path / "run", WILD_NAME)["diverged"]


def test_a_marked_sae_whose_loss_is_no_longer_finite_is_stopped_and_reported_once(tiny_store: Store) -> None:
    site = tiny_store.site("mlp.1")
    run = config(on_divergence="continue").resolved(device="cpu", threads=1)
    group = Group(0, run.groups()[0], run, Inputs.of(site, run))
    group.divergence.at[0], group.divergence.reason[0] = 30, 2  # marked, and trained on
    group.stopped[0], group.step = 44, 48  # since then
    lines = [line(), line()]
    assert [(found.step, found.action) for found in group.judge(lines)] == [(44, "stop")]
    assert group.judge(lines) == []


@pytest.mark.parametrize("action", mostly_slow(["retry", "stop", "continue"], "retry"))
def test_a_run_stopped_anywhere_deals_with_divergence_to_the_same_bytes(
    tiny_store: Store, tmp_path: Path, action: str
) -> None:
    saved = {"on_divergence": action, "checkpoint_every": 7}
    run(tiny_store, tmp_path / "whole", **saved)
    for _ in range(20):
        before = len(list((tmp_path / "run").rglob("*"))) if (tmp_path / "run").exists() else 0

        def stop(event: Event) -> None:
            if isinstance(event, Checkpointed):
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            train(tiny_store.site("mlp.1"), config(**saved), tmp_path / "run", stop)
        except InterruptedRun:
            assert len(list((tmp_path / "run").rglob("*"))) >= before
            continue
        break
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_dead_says_over_how_many_rows(tiny_store: Store, tmp_path: Path) -> None:
    run(tiny_store, tmp_path / "run", saes=(CALM,))
    rows = tiny_store.site("mlp.1").moments.within(10.0).rows
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [one["dead_rows"] for one in lines] == [min(96 * one["step"], rows) for one in lines]
    assert lines[0]["dead_rows"] < rows == lines[-1]["dead_rows"]
