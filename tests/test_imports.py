"""The direction of imports, and that looking at the command costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gsae
from gsae.commands import COMMANDS
from gsae.tests.support.layers import LAYERS, PLAIN, ROOMS
from gsae.tests.support.selection import mostly_slow

ROOT = Path(gsae.__file__).parent
LANGUAGE_MODELS = {"transformers", "datasets", "tokenizers"}
HEAVY = {"torch", "transformers", "numba", "datasets", "zarr", "numpy"}


def imports(path: Path) -> list[tuple[int, str]]:
    """Every (level, module) that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [(node.level, f"{node.module or ''}.{alias.name}".strip(".")) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
    return found


def exported(root: Path, room: str) -> set[str]:
    """The names in `__all__` of a room's facade: `facade.py` where importing is lazy, else `__init__.py`."""
    lazy = root / room / "facade.py"
    for node in ast.parse((lazy if lazy.exists() else root / room / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def layer(room: str, name: str) -> int:
    """The place of a sub-room or file in its room's order."""
    order = LAYERS[room]
    return order.index(name) if name in order else order.index("*")


def fault(root: Path, path: Path, level: int, module: str) -> str | None:
    """What is wrong with one import of a file, None where nothing is."""
    here = path.relative_to(root).with_suffix("").parts
    room, parts = here[0], module.split(".")
    if level > 1:
        return "reaches over its folder"
    if level == 1:
        parts = ["gsae", *here[:-1], *parts]
    if parts[0] in LANGUAGE_MODELS and room != "harvest":
        return "is for harvest/ alone"
    if parts[0] != "gsae" or len(parts) == 1 or (parts[1] in PLAIN and parts[1] in (*ROOMS[room], "__version__")):
        return None
    if parts[1] not in ROOMS[room]:
        return f"is not a room before {room}"
    if parts[1] != room:
        outside = len(parts) != 3 or parts[2] not in exported(root, parts[1])
        return f"is not exported by gsae.{parts[1]}" if outside else None
    if here[1] in ("__init__", "facade"):
        return None
    if len(parts) < 4 and not (root / room / f"{parts[2]}.py").exists():
        return "is the room's own facade"
    return "stands after it" if layer(room, parts[2]) > layer(room, here[1]) else None


def faults(root: Path, room: str) -> list[str]:
    """Every import of a room's files against the order of the rooms or of the layers inside it."""
    files = sorted((root / room).rglob("*.py")) or [root / f"{room}.py"]
    assert all(path.is_file() for path in files)
    told = [(path, module, fault(root, path, level, module)) for path in files for level, module in imports(path)]
    return [f"{path.relative_to(root)}: {module} {what}" for path, module, what in told if what]


@pytest.mark.parametrize("room", ROOMS)
def test_a_file_imports_only_what_stands_before_it(room: str) -> None:
    assert faults(ROOT, room) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("store/codec/planted.py", "from gsae.store.read.site import Site"),
        ("store/codec/planted.py", "from gsae.harvest import harvest"),
        ("store/read/planted.py", "from gsae.store import open_store"),
        ("train/step/planted.py", "from gsae.harvest import harvest"),
        ("train/step/planted.py", "from gsae.train.run.trainer import train"),
        ("train/run/planted.py", "from gsae.store.read.site import Site"),
        ("train/run/planted.py", "import transformers"),
        ("evaluate/planted.py", "from gsae.evaluate.report.runs import read_run"),
        ("features/find/planted.py", "from gsae.evaluate.metrics import Totals"),
        ("features/find/planted.py", "from ..browse import site"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    for facade in (*ROOT.glob("*/__init__.py"), *ROOT.glob("*/facade.py")):
        (tmp_path / facade.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        (tmp_path / facade.relative_to(ROOT)).write_text(facade.read_text())
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"def late() -> None:\n    {line}\n")
    room = file.split("/")[0]
    assert [each for each in faults(tmp_path, room) if each.startswith(file)]
    assert len(faults(tmp_path, room)) == 1


def loaded(code: str) -> set[str]:
    """Names of the top-level modules that a fresh process has after `code`."""
    script = f"{code}\nimport sys\nprint('\\nLOADED', *{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


WORDS = [["--help"], *([name, "--help"] for name in COMMANDS)]


@pytest.mark.parametrize("words", mostly_slow(WORDS, ["--help"], ["harvest", "--help"]), ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['gsae', *{words}]\nfrom gsae.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )
    found = loaded(code)
    assert not HEAVY & found
    assert len(words) > 1 or not {"pydantic", "rich"} & found


def test_an_interrupted_command_imports_nothing_heavy() -> None:
    code = (
        "import os, signal, sys; sys.argv = ['gsae', 'info']\nfrom gsae import cli\n"
        "cli.app = lambda **_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert end.code == 143, end.code\n"
    )
    assert not HEAVY & loaded(code)


def test_importing_the_package_imports_nothing_of_it() -> None:
    assert not (HEAVY | {"typer", "pydantic"}) & loaded("import gsae")


@pytest.mark.slow
def test_training_never_imports_the_language_models_libraries() -> None:
    assert "torch" in (found := loaded("import gsae.train, gsae.evaluate"))
    assert not LANGUAGE_MODELS & found
