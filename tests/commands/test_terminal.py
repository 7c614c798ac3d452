"""What a person sees of a training run: a table on a terminal, lines in a log."""

import io
from typing import Any

import pytest

from gsae.commands.terminal import TrainingShown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LINE: dict[str, Any] = {"sae": "gated-w8-l1_0.1-seed0", "l0": 31.42, "explained_variance": 0.81234, "gamma": 1.0041,
                        "loss": 0.3456, "dead": 0.125, "path": "sparse"}  # fmt: skip
STOPPED = LINE | {"sae": "relu-w8-l1_0.1-seed0", "stopped": 7} | dict.fromkeys(
    ("l0", "explained_variance", "gamma", "loss", "dead")
)  # fmt: skip


def shown(stream: io.StringIO, every: float = 0.0) -> str:
    with TrainingShown(stream, every) as view:
        view.say("beginning: [2] SAEs")
        view.figures(50, 200, 12345.6, 0.012, [LINE | {"heldout": {"l0": 30.5, "explained_variance": 0.8}}, STOPPED])
        view.figures(100, 200, 12345.6, 0.012, [LINE, STOPPED])
        view.figures(200, 200, 12345.6, 0.012, [LINE, STOPPED])
    return stream.getvalue()


def test_a_log_has_the_run_and_then_a_line_an_sae() -> None:
    lines = shown(io.StringIO()).splitlines()
    assert lines[:4] == [
        "beginning: [2] SAEs",
        "step 50 of 200 (25 %), 12,346 rows/s, waiting for data 1 %",
        "  gated-w8-l1_0.1-seed0: L0 31.4, explained variance 0.8123, gamma 1.004, loss 0.3456, dead 12.5%, "
        "path sparse, held-out L0 30.5, held-out e.v. 0.8000",
        "  relu-w8-l1_0.1-seed0: path stopped",
    ]
    assert "held-out L0 30.5" in lines[-2]  # what was measured last stays


def test_a_log_is_told_every_few_seconds_and_at_the_end() -> None:
    told = [line for line in shown(io.StringIO(), every=1e9).splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in told] == ["50", "200"] or [line.split()[1] for line in told] == ["200"]


def test_a_log_has_the_saes_seldom_and_at_the_end_and_says_how_long_it_will_take() -> None:
    stream = io.StringIO()
    with TrainingShown(stream, 0.0, tables_every=1e9) as view:
        for step in (50, 100, 150, 200):
            view.figures(step, 200, 12345.6, 0.012, [LINE])
    lines = stream.getvalue().splitlines()
    heads = [line for line in lines if line.startswith("step")]
    assert [head.endswith(" s left") for head in heads] == [False, True, True, False]
    assert len(lines) - len(heads) in (1, 2)  # a machine's clock may stand at less than the interval
    assert lines[-1].startswith("  gated-w8")


def test_a_terminal_shows_a_table_with_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = shown(Terminal())
    for word in (
        "beginning: [2] SAEs",
        "step 200 of 200",
        "12,346 rows/s",
        "gamma",
        "gated-w8-l1_0.1",
        "0.8123",
        "stopped",
    ):
        assert word in text
