"""The folder of a feature browser: it appears complete or not at all, and holds the page beside its data.

A folder that was made from the same features by the same gsae is left alone. Processes that make the same folder wait
for one another.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gsae.errors import UsageError
from gsae.files import alone, disk_errors, replace_folder, sweep

SCHEMA = 1
INDEX = "data/index.json"


def make_folder(out: Path, digest: str, fill: Callable[[Path], None]) -> None:
    """Make `out` from a copy of the page and the data that `fill` writes to the folder that it gets.

    digest: of what the data follows from. Nothing is done where `out` has it already. Raises UsageError where `out`
    holds anything but a browser, and SpaceError on a full disk.
    """

    def fill_beside_page(folder: Path) -> None:
        shutil.copytree(_page(), folder)
        fill(folder)

    with disk_errors(out):
        try:
            with alone(out.parent, f"making-{out.name}"):
                if _digest_in(out) != digest:
                    _refuse_others(out)
                    replace_folder(out, fill_beside_page)
        finally:
            sweep(out.parent)


def digest_of(values: Sequence[dict[str, Any]]) -> str:
    """Return a digest of all that a browser's bytes follow from: `values`, which name the features, and the page."""
    digest = hashlib.sha256(json.dumps([SCHEMA, version("gsae"), *values], sort_keys=True).encode())
    for path in sorted(_page().iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write compact JSON in ASCII, in the folder that `make_folder` fills."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, allow_nan=False, separators=(",", ":")), encoding="ascii")


def _digest_in(out: Path) -> str | None:
    """Return the digest that a browser's index has; None where there is no complete browser."""
    try:
        found = json.loads((out / INDEX).read_text(encoding="utf-8"))
        return str(found["made_of"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_others(out: Path) -> None:
    if out.exists() and _digest_in(out) is None and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not a feature browser. Give another --out, or remove it.")


def _page() -> Path:
    return Path(str(resources.files(__package__) / "page"))
