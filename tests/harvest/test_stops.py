"""Signals: the first ends a harvest cleanly, the second at once; the same command then completes to the same bytes."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gsae.store import CONFIRMED, open_store, verify
from gsae.tests.support.children import files
from gsae.tests.support.command import gsae

pytestmark = pytest.mark.kill

# Writes slowly, so that a signal always finds a window that is being published behind the passes.
SLOW = """
import sys, time
from gsae.harvest import windows
real, pause, begun = windows.encode_window, float(sys.argv[1]), sys.argv[2]
def slow(*given, **named):
    open(begun, "w").close()
    time.sleep(pause)
    return real(*given, **named)
windows.encode_window = slow
from gsae.cli import main
sys.argv = ["gsae", *sys.argv[3:]]
main()
"""


@pytest.fixture(scope="module")
def command(tiny_llama: Path) -> list[str]:
    asked: list[Any] = ["harvest", "--model", tiny_llama, "--dataset", "builtin:pydoc", "--context-size", 64]
    asked += ["--site", "mlp.1", "--rows", 3000, "--window-rows", 512, "--device", "cpu", "--threads", 1]
    return list(map(str, asked))


@pytest.fixture(scope="module")
def undisturbed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    assert gsae(*command, "--out", out).returncode == 0
    return files(out)


def started(command: list[str], out: Path, pause: float) -> "subprocess.Popen[str]":
    """Start a harvest that waits `pause` seconds before each window is written; wait for its first record.

    With a pause of more than 10 seconds, wait only until it is about to write.
    """
    begun = out.with_name("begun")
    known = [sys.executable, "-c", SLOW, str(pause), str(begun), *command, "--out", str(out)]
    process = subprocess.Popen(known, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (begun.exists() if pause > 10 else list(out.glob("shards/*"))):
        time.sleep(0.01)
    return process


def caught(process: "subprocess.Popen[str]", number: signal.Signals) -> bool:
    """Whether the process has installed a handler for a signal (Linux)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(mask >> (number - 1) & 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_harvest_cleanly_and_the_same_command_completes_to_the_same_bytes(
    command: list[str], undisturbed: dict[str, bytes], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "store"
    process = started(command, out, 0.3)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code, said
    assert f"Stopped by {number.name}. The same command continues from here." in said
    assert "Traceback" not in said
    assert not list((out / ".tmp").glob("*"))  # what was being written was published, or never begun
    left = {name: data for name, data in files(out).items() if name != CONFIRMED}
    assert left.items() < undisturbed.items()
    assert gsae(*command, "--out", out).returncode == 0
    assert files(out) == undisturbed
    assert verify(open_store(out), deep=True) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_second_ctrl_c_ends_a_harvest_at_once(
    command: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "store"
    process = started(command, out, 600)
    while not caught(process, signal.SIGINT):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    while process.poll() is None and caught(process, signal.SIGINT):
        time.sleep(0.01)
    time.sleep(0.2)
    assert process.poll() is None  # it waits for the window that is being written
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    assert process.stderr is not None
    process.stderr.close()
    assert gsae(*command, "--out", out).returncode == 0
    assert files(out) == undisturbed
