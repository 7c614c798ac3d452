"""What the commands show: progress of a training run on a terminal and in a log; facts and tables on stdout."""

import io
import json
from typing import Any

import pytest

from gsae.commands.terminal import TrainingShown, print_facts, print_table


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


def test_a_log_gets_a_line_every_few_seconds_and_at_the_end() -> None:
    heads = [line for line in shown(io.StringIO(), every=1e9).splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in heads] == ["50", "200"] or [line.split()[1] for line in heads] == ["200"]


def test_a_log_lists_the_saes_seldom_and_at_the_end_and_says_how_long_it_will_take() -> None:
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


FACTS: dict[str, Any] = {
    "state": "complete",
    "rows": {"train": 7500, "heldout": 250},
    "moments": {"mlp.1": {f"a fact of number {i}": 1234.5678 for i in range(8)}},
    "missing": [],
    "windows": ["train 3 to 17", "heldout 0"],
    "requested_rows": None,
    "ended_early": False,
    "saes": [{"sae": "a [b] :smile:", "l0": 31.4159, "path": None}, {"sae": "c", "l0": 1234567, "path": True}],
}


def test_facts_are_lines_of_at_most_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts(FACTS, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == ["state: complete", "rows:", "  train: 7,500", "  heldout: 250", "moments:"]
    assert lines[5].startswith("  mlp.1: a fact of number 0 1235, ")
    assert lines[6].startswith("      ")
    assert max(map(len, lines)) <= 100
    assert lines[-8:] == [
        "missing: -",
        "windows: train 3 to 17, heldout 0",
        "requested_rows: -",
        "ended_early: no",
        "saes:",
        "sae                   l0  path",
        "a [b] :smile:      31.42     -",
        "c              1,234,567   yes",
    ]


def test_facts_as_json_are_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts(FACTS, as_json=True)
    assert json.loads(capsys.readouterr().out) == FACTS


def test_a_table_in_a_file_has_one_line_a_record_and_on_a_terminal_it_is_wrapped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"path": "s3://team/" + "deep/" * 40, "rows": 7}]
    print_table(("path", "rows"), rows)
    assert len(capsys.readouterr().out.splitlines()) == 2
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", "dumb")
    print_table(("path", "rows"), rows)
    lines = stream.getvalue().splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 80
    assert "".join(line[:74].strip() for line in lines[1:]).replace(" ", "").startswith("s3://team/deep/deep/")
