"""What the pages name exists: links, files, commands and options.

`make docs` checks links as well, but needs mkdocs; this needs nothing and runs with every test.
"""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gsae.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "RESULTS.md"])
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")
FILE = re.compile(
    r"(?<![\w/.])((?:bench|commands|docs|evaluate|features|harvest|store|tests|train)/[\w./-]+\.(?:md|py))\b"
)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^ {4,}(?:\$ )?|`)(?:exec |torchrun .*-m )?gsae(?:\.cli)? ([a-z]+\b[^`]*)")
FLAG = re.compile(r"`(--[a-z][a-z-]*)[ `=]")


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: str, folder: Path) -> list[str]:
    """The relative links of a page in `folder` without a file or a heading."""
    found = []
    for link in LINK.finditer(page):
        path, anchor = link.groups()
        target = (folder / path).resolve() if path else None
        if target is not None and not target.exists():
            found.append(link[0])
            continue
        text = page if target is None else target.read_text() if anchor else ""
        if anchor and anchor not in anchors(text):
            found.append(link[0])
    return found


def missing_files(page: str) -> list[str]:
    """The files that a page names and that do not exist; its fenced examples may name new ones."""
    return [name for name in FILE.findall(FENCED.sub("", page)) if not (ROOT / name).exists()]


@cache
def options(command: str) -> frozenset[str]:
    """The options of a command; empty if there is no such command."""
    done = CliRunner().invoke(app, [command, "--help"])
    return frozenset(re.findall(r"--[a-z][a-z0-9-]*", done.output)) if done.exit_code == 0 else frozenset()


def wrong_commands(page: str) -> list[str]:
    """The uses of `gsae` in a page that name a command or an option that does not exist."""
    found = []
    for line in page.replace("\\\n", " ").splitlines():
        for use in COMMAND.findall(line):
            name, *words = shlex.split(re.sub(r"[][|]", " ", use), comments=True)
            flags = {word.split("=")[0] for word in words if word.startswith("--")}
            if not options(name) or flags - options(name):
                found.append(use)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_files_and_commands_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    assert broken_links(text, page.parent) == []
    assert missing_files(text) == []
    if page.name != "extending.md":  # its example adds a command: test_extending.py
        assert wrong_commands(text) == []


def test_options_named_alone_belong_to_some_command() -> None:
    known = frozenset().union(
        *(options(name) for name in re.findall(r"gsae ([a-z]+)", (ROOT / "README.md").read_text()))
    )
    for page in PAGES:
        if page.name != "RESULTS.md":  # which names the options of the scripts in bench/
            named = set(FLAG.findall(page.read_text()))
            assert named <= known, page


def test_what_does_not_exist_is_noticed() -> None:
    docs = ROOT / "docs"
    assert broken_links("[a](nowhere.md) [b](format.md#nothing) [c](#here)\n# There", docs) == [
        "](nowhere.md)",
        "](format.md#nothing)",
        "](#here)",
    ]
    assert missing_files("see `store/nothing.py` and store/read/site.py") == ["store/nothing.py"]
    assert wrong_commands("    gsae trane STORE\n`gsae eval --nothing`\n    gsae info \\\n        --nothing\n") == [
        "trane STORE",
        "eval --nothing",
        "info          --nothing",
    ]
    assert wrong_commands("    gsae info STORE --json  # it's fine\n") == []
