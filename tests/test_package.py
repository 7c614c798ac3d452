"""The wheel holds the package and nothing else of the repository."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import gsae

ROOT = Path(gsae.__file__).parent
ROOMS = ("harvest", "store", "train", "evaluate", "features", "commands")


def test_the_wheel_holds_exactly_the_package(tmp_path: Path) -> None:
    """Built from the files that are in the repository, offline, with the setuptools that is installed."""
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    assert tracked.returncode == 0, tracked.stderr
    copy = tmp_path / "source"
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    subprocess.run([*build, str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {
        f"gsae/{name}" for name in ("py.typed", "__init__.py", "cli.py", "errors.py", "files.py", "settings.py")
    }
    for room in ROOMS:
        expected |= {f"gsae/{p.relative_to(ROOT)}" for p in (ROOT / room).rglob("*.py")}
    expected |= {"gsae/evaluate/report/template.html"}
    expected |= {f"gsae/{p.relative_to(ROOT)}" for p in (ROOT / "features" / "browse" / "page").iterdir()}
    assert names == expected


def test_the_version_is_stated_once() -> None:
    """pyproject.toml reads it from `__init__.py`, so the installed package cannot say another one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert version("gsae") == gsae.__version__
