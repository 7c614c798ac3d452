"""The command `gsae browse`: it prints its address, ends cleanly at Ctrl-C, and prints the ratings."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gsae.tests.support.browser_run import write_features
from gsae.tests.support.command import gsae, refused


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_features(tmp_path / "run")
    write_features(tmp_path / "run", "relu-w70", architecture="relu", d_sae=70)
    return tmp_path / "run"


def served(arguments: list[Any], visit: Callable[[str], None], number: signal.Signals) -> tuple[int, str]:
    """Serve, visit the address that is printed, and stop by a signal; return exit code and stdout."""
    command = [sys.executable, "-m", "gsae.cli", "browse", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = next(found[0] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+/", line)))
    visit(url)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    return process.returncode, out


def assert_rates(url: str, trial: int, rating: int) -> None:
    body = json.dumps({"trial": trial, "rating": rating}).encode()
    headers = {"Content-Type": "application/json", "Origin": url.rstrip("/")}
    with urllib.request.urlopen(urllib.request.Request(f"{url}ratings", body, headers), timeout=10) as answer:
        assert json.load(answer)[str(trial)] == rating


def test_no_serve_only_writes_files_to_out(run: Path, tmp_path: Path) -> None:
    done = gsae("browse", run, "--sae", "relu-w70", "--no-serve", "--out", tmp_path / "site", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"browser": str(tmp_path / "site")}
    (sae,) = json.loads((tmp_path / "site/data/index.json").read_text())["saes"]
    assert sae["sae"] == "relu-w70"


@pytest.mark.kill
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped(run: Path, number: signal.Signals) -> None:
    seen = []

    def visit(url: str) -> None:
        with urllib.request.urlopen(f"{url}data/index.json", timeout=10) as answer:
            seen.extend(sae["sae"] for sae in json.load(answer)["saes"])

    code, out = served([run], visit, number)
    assert (code, seen) == (0, ["gated-w100", "relu-w70"])
    assert out == f"{run / 'browser'}: any static web server shows it.\n"


@pytest.mark.kill
def test_a_blind_comparison_continues_and_is_printed(run: Path) -> None:
    blind = [run, "--blind", "--pairs", "2", "--seed", "4"]
    code, out = served(blind, lambda url: assert_rates(url, 0, 2), signal.SIGINT)
    assert (code, "1 of 4 rated." in out, "Mean difference" in out) == (0, True, False)

    def rest(url: str) -> None:
        for trial in (1, 2, 3):
            assert_rates(url, trial, 1)

    code, out = served(blind, rest, signal.SIGINT)
    assert code == 0
    assert re.search(r"Mean difference, gated-w100 minus relu-w70, over 2 pairs: -?0\.50 \(95 % interval", out)
    found = json.loads(gsae("browse", *blind, "--no-serve", "--json").stdout)
    assert (found["rated"], found["trials"], found["pairs"]) == (4, 4, 2)


def test_what_cannot_be_shown_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    refused(3, "Run `gsae features", "browse", tmp_path, "--no-serve")
    refused(3, "gated-w999", "browse", run, "--no-serve", "--sae", "gated-w999")
    refused(2, "Give --sae twice; ", "browse", run, "--no-serve", "--blind", "--sae", "relu-w70")
    refused(2, "--pairs 5000", "browse", run, "--no-serve", "--blind", "--pairs", "5000")
