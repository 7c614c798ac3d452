"""What `--help` shows: every command and option, grouped, on few lines, at once."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gsae.cli import LazyCommand
from gsae.commands import COMMANDS, HELP_WIDTH
from gsae.tests.support.command import gsae

SCREEN = 50  # lines
PROGRESS = "import sys\nsys.argv = ['gsae', *{words}]\nfrom gsae.cli import main\n"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(HELP_WIDTH))


def shown(*words: str) -> list[str]:
    done = gsae(*words, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def options(name: str) -> list[Any]:
    return [each for each in LazyCommand(name).load().params if each.param_type_name == "option"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_each_of_its_parameters_has_help(name: str) -> None:
    command = LazyCommand(name).load()
    assert str(command.help).split("\n")[0] == COMMANDS[name][1]
    for parameter in command.params:
        assert parameter.help, (name, parameter.name)
        assert parameter.help.rstrip().endswith((".", "?")), (name, parameter.name)
    for option in options(name):
        assert option.is_flag or option.metavar, (name, option.name)  # a value's name or unit
        stated = option.required or option.default is not None or "Default: " in option.help
        assert stated or option.is_flag, (name, option.name)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_lists_all_of_it_within_the_width(name: str) -> None:
    lines = shown(name)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= HELP_WIDTH
    assert lines[0].startswith(f"Usage: gsae {name} ")
    for option in options(name):
        assert f"\n  {option.opts[0]}" in text


def test_every_command_is_in_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert [name for name in COMMANDS if f"gsae {name}" not in readme] == []


def test_the_list_of_commands_has_whole_summaries() -> None:
    lines = shown()
    assert lines[0].startswith("Usage: gsae ")
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name:<10}{summary}" in lines


@pytest.mark.parametrize("name", ["harvest", "train"])
def test_the_options_that_one_needs_come_first_and_all_fit_two_screens(name: str) -> None:
    lines = shown(name)
    assert len(lines) <= 2 * SCREEN
    titles = [line for line in lines if re.fullmatch(r"[A-Z].*:", line)]
    assert next(title for title in titles if title != "Arguments:") == "What one needs:"
    begin = lines.index("What one needs:")
    needed = [line for line in lines[begin + 1 : lines.index("", begin)] if line.startswith("  --")]
    assert len(needed) == 6
    assert lines.index("", begin) < SCREEN
    assert len(titles) >= 6


def test_the_first_screen_of_a_harvest_has_its_six_options() -> None:
    lines = shown("harvest")
    first = [line.split()[0] for line in lines[lines.index("What one needs:") :] if line.startswith("  --")][:6]
    assert first == ["--model", "--dataset", "--site", "--rows", "--context-size", "--out"]


def test_the_summary_help_takes_less_than_a_third_of_a_second_of_cpu_time() -> None:
    assert min(cpu_seconds("--help") for _ in range(3)) < 0.3
    assert min(cpu_seconds("harvest", "--help") for _ in range(3)) < 1


def cpu_seconds(*words: str) -> float:
    """CPU time of a fresh process: other work on the machine does not count."""
    script = PROGRESS.format(words=list(words)) + (
        "import atexit, time\natexit.register(lambda: print(time.process_time(), file=sys.stderr))\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stderr.split()[-1])


def test_without_arguments_the_help_is_shown() -> None:
    done = gsae()
    assert done.returncode == 2
    assert "Commands:" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["harvset"], "No such command 'harvset'. Did you mean 'harvest'?"),
        (["info", "--jsn", "x"], "No such option: --jsn"),
        (["train", "x"], "Missing option"),
        (["harvest", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["harvest", "--drop-positions", "first"], "Invalid value for '--drop-positions': got 'first'; give numbers"),
    ],
)
def test_a_wrong_command_line_is_refused_as_typer_does(words: list[str], said: str) -> None:
    done = gsae(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "--help' for help." in done.stderr
    assert done.stdout == ""


def test_the_version_is_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "gsae.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("gsae 0.")
