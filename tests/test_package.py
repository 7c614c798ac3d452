"""The wheel holds the package and nothing else of the repository; a forgotten sub-package or file is noticed."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import gsae

ROOT = Path(gsae.__file__).parent
OUTSIDE = ("bench", "docs", "tests")  # folders of the repository that are no part of the package
DATA = ("py.typed", "evaluate/report/page/", "features/browse/page/")  # files and folders without code


def repository() -> list[str]:
    """Return the paths of all files of the repository, those included that are not added to git yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def package(root: Path) -> set[str]:
    """Return the paths in the wheel of the code and data files of the package whose repository is copied to `root`."""
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    code = {name for name in names if name.endswith(".py") and name.split("/")[0] not in OUTSIDE}
    return {f"gsae/{name}" for name in code | {name for name in names if name.startswith(DATA)}}


def unlisted(root: Path) -> set[str]:
    """Return the packages below `root`, as folders with an __init__.py, that pyproject.toml does not list."""
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {name.rpartition("/")[0] for name in package(root) if name.endswith("/__init__.py")}
    return {folder.replace("/", ".") for folder in folders} - set(listed)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository with one more sub-package, which is not listed."""
    for name in [*repository(), "store/planted/__init__.py"]:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes((ROOT / name).read_bytes() if (ROOT / name).exists() else b"")
    return tmp_path / "copy"


def test_every_sub_package_is_listed_and_one_that_is_not_is_found(copy: Path) -> None:
    assert unlisted(copy) == {"gsae.store.planted"}


@pytest.mark.slow
def test_the_wheel_holds_exactly_the_package_and_a_sub_package_that_is_not_listed_is_missing(
    copy: Path, tmp_path: Path
) -> None:
    """Built offline, with the setuptools that is installed."""
    expected = package(copy)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    subprocess.run([*build, str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names - expected == set()
    assert expected - names == {"gsae/store/planted/__init__.py"}


def test_the_version_is_stated_once() -> None:
    """pyproject.toml reads it from `__init__.py`, so the installed package cannot say another one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert version("gsae") == gsae.__version__
