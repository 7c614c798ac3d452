"""The direction of imports, and that looking at the command costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gsae

ROOT = Path(gsae.__file__).parent
ALLOWED = {
    "store": {"store"},
    "harvest": {"harvest", "store"},
    "train": {"train", "store"},
    "evaluate": {"evaluate", "store", "train"},
    "features": {"features", "evaluate", "store", "train"},
}
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


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_the_rooms_before_it(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for level, module in imports(path):
            parts = module.split(".")
            assert level < 2, f"{path.name} reaches over its folder: {module}"
            if level == 0 and parts[0] == "gsae" and parts[1:]:
                assert parts[1] in ALLOWED[room] | {"__version__"}, f"{room}/{path.name} imports {module}"
                if parts[1] != room and parts[1] != "__version__":
                    exported = len(parts) == 3 and parts[2] in vars(__import__(f"gsae.{parts[1]}", fromlist=["x"]))
                    assert exported, f"{room}/{path.name} imports {module}, which gsae.{parts[1]} does not export"
            assert room == "harvest" or parts[0] not in LANGUAGE_MODELS, f"{room}/{path.name} imports {module}"


def loaded(code: str) -> set[str]:
    """Names of the top-level modules that a fresh process has after `code`."""
    script = f"{code}\nimport sys\nprint('\\nLOADED', *{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['gsae', '--help']\nfrom gsae.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )
    assert not HEAVY & loaded(code)


def test_importing_the_package_imports_nothing_of_it() -> None:
    assert not (HEAVY | {"typer", "pydantic"}) & loaded("import gsae")


def test_training_never_imports_the_language_models_libraries() -> None:
    assert "torch" in (found := loaded("import gsae.train, gsae.evaluate"))
    assert not LANGUAGE_MODELS & found


def test_the_store_works_without_numba() -> None:
    """In plain numpy, slower: the same digest and the same batches."""
    code = (
        "import sys, tempfile, pathlib, hashlib\n{block}"
        "from gsae.tests.stores import make_store\n"
        "from gsae.store.streaming import HAVE_NUMBA\n"
        "store = make_store(pathlib.Path(tempfile.mkdtemp()) / 's', contexts=40)\n"
        "rows = b''.join(x.float().numpy().tobytes() for x in store.site('mlp.1').batches(64, max_norm_multiple=1.2))\n"
        "print('FOUND', HAVE_NUMBA, store.digest, hashlib.sha256(rows).hexdigest())"
    )
    answers = []
    for block in ("", "sys.modules['numba'] = None\n"):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("{block}", block)], capture_output=True, text=True, check=True
        )
        answers.append(done.stdout.split("FOUND ")[1].split())
    assert [a[0] for a in answers] == ["True", "False"]
    assert answers[0][1:] == answers[1][1:]
