"""The tables of options in docs/ say what the commands take."""

from pathlib import Path

import pytest

from gsae.cli import LazyCommand
from gsae.commands.help import options_table
from gsae.tests.support.option_tables import DOCS, TABLE, with_tables


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_a_page_has_the_options_as_they_are(page: Path) -> None:
    text = page.read_text()
    assert with_tables(text) == text, "run python -m gsae.tests.support.option_tables"


def test_the_page_of_options_has_the_two_large_commands() -> None:
    assert [found[2] for found in TABLE.finditer((DOCS / "options.md").read_text())] == ["harvest", "train"]


def test_a_changed_table_is_noticed() -> None:
    page = "before\n<!-- options: verify -->\nold\n<!-- end -->\nafter\n"
    made = with_tables(page)
    assert made.startswith("before\n<!-- options: verify -->\n\n| option | type | default | meaning |\n")
    assert made.endswith("|\n\n<!-- end -->\nafter\n")
    assert with_tables(made) == made


def test_every_option_of_a_harvest_has_a_row() -> None:
    command = LazyCommand("harvest").load()
    table = options_table(command)
    for option in command.params:
        assert f"| `{option.opts[0]}`" in table
    assert "| `--codec` | `[planes\\|zstd\\|none]` | `planes` |" in table
    assert "| `--rows` | `ROWS` | all that the text gives | Train rows to store. |" in table
    assert "| **Text** | | | |" in table
