"""ARCHITECTURE.md describes the files as they are."""

import re
from pathlib import Path

import gsae
from gsae.tests.support.architecture_tree import ROOMS, with_tree

ROOT = Path(gsae.__file__).parent
PAGE = (ROOT / "ARCHITECTURE.md").read_text()


def test_the_tree_has_every_file_with_its_first_sentence() -> None:
    assert with_tree(PAGE) == PAGE, "run python -m gsae.tests.support.architecture_tree"


def test_a_new_file_is_missed_in_the_tree(tmp_path: Path) -> None:
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(ROOT)).write_text(path.read_text())
    (tmp_path / "store" / "codec" / "planted.py").write_text('"""A file that nobody described."""\n')
    assert "planted.py" in with_tree(PAGE, tmp_path)


def test_every_file_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`((?:store|harvest|train|evaluate|features|commands|tests)/[\w/]+\.py)`", PAGE))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
