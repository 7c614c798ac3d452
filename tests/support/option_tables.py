"""The tables of options in docs/, which stand between `<!-- options: COMMAND -->` and `<!-- end -->`.

`python -m gsae.tests.support.option_tables` writes them again after an option was changed.
"""

import re
from pathlib import Path

import gsae
from gsae.cli import LazyCommand
from gsae.commands.help import options_table

DOCS = Path(gsae.__file__).parent / "docs"
TABLE = re.compile(r"(<!-- options: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """Return a page with each of its tables made from the command's options as they are now."""
    return TABLE.sub(lambda found: f"{found[1]}\n{options_table(LazyCommand(found[2]).load())}\n{found[3]}", page)


if __name__ == "__main__":
    for path in sorted(DOCS.glob("*.md")):
        path.write_text(with_tables(path.read_text()))
