"""The tree of files in ARCHITECTURE.md, which stands between `<!-- tree -->` and `<!-- end -->`.

Each line is a file and the first sentence of its docstring. `python -m gsae.tests.support.architecture_tree` writes the
tree again after a file was added, moved or described anew.
"""

import ast
import re
from pathlib import Path

import gsae
from gsae.tests.support.layers import LAYERS

ROOT = Path(gsae.__file__).parent
ROOMS = ("store", "harvest", "train", "evaluate", "features", "commands")
TOP = ("errors.py", "files.py", "settings.py", "lazy.py", *ROOMS, "cli.py")
TREE = re.compile(r"(<!-- tree -->\n).*?(\n<!-- end -->)", re.DOTALL)
NAME = 24  # columns


def with_tree(page: str, root: Path = ROOT) -> str:
    """Return a page with its tree made from the files as they are now."""
    tree = "\n".join(["```text", *(line for name in TOP for line in lines(root / name, 0)), "```"])
    return TREE.sub(lambda found: f"{found[1]}\n{tree}\n{found[2]}", page)


def lines(path: Path, depth: int) -> list[str]:
    """The lines of a file, or of a folder and what is in it: sub-rooms first, in the order of the layers."""
    if path.is_file():
        return [line(path.name, summary(path), depth)]
    inside = sorted((p for p in path.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()), key=order)
    found = [line(f"{path.name}/", summary(path / "__init__.py"), depth)]
    found += [each for p in inside if p.name != "__init__.py" for each in lines(p, depth + 1)]
    if data := [p.name for p in sorted(path.iterdir()) if p.is_dir() and p.name == "page"]:
        found.append(line(f"{data[0]}/", "The page: HTML, style and scripts.", depth + 1))
    return found


def order(path: Path) -> tuple[int, str]:
    """Sub-rooms in the order of their layers, then files by name."""
    layers = LAYERS.get(path.parent.name, ())
    return (layers.index(path.name) if path.is_dir() and path.name in layers else len(layers)), path.name


def line(name: str, text: str, depth: int) -> str:
    """A name, indented, and what it is."""
    return f"{'  ' * depth}{name:<{NAME - 2 * depth}}  {text}"


def summary(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<! al)\. (?=[A-Z`])", text)[0].rstrip(".") + "."


if __name__ == "__main__":
    page = ROOT / "ARCHITECTURE.md"
    page.write_text(with_tree(page.read_text()))
