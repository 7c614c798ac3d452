"""Which files a text consists of: one file, the matches of a glob, a folder, or a folder of `save_to_disk`.

The files of a text are sorted by name, so that its order does not depend on the file system. A folder is read with all
its sub-folders. If file or folder names in it are those of splits (train, validation, test), `--split` chooses among
them, as `datasets` does. Listing a folder costs one walk over it; no file is opened.
"""

import glob
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsae.errors import NotFoundError, UsageError

from .file_formats import NAMES, FileFormat, format_of

# What Hub repositories and `datasets` keep beside the text.
NO_TEXT = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class TextFile:
    """A file of a text. name: its path below the folder of the text, with `/`."""

    name: str
    path: Path
    format: FileFormat


@dataclass(frozen=True)
class TextFiles:
    """The files of a text, in the order in which they are read.

    id: the name of the text in the plan, without the folders above it. single: the name was that of one file.
    """

    id: str
    files: tuple[TextFile, ...]
    single: bool = False


def may_name_files(dataset: str) -> bool:
    """Return whether `dataset` has the ending of a known format, is a glob, or is a path that exists."""
    return format_of(dataset) is not None or _is_glob(dataset) or Path(dataset).expanduser().exists()


def text_id(dataset: str) -> str:
    """Return the name that the plan has of a local text: the last part of its path, or all of a glob from there on."""
    path = Path(dataset).expanduser()
    if not _is_glob(dataset) or path.exists():
        return path.name or path.resolve().name
    base = _fixed_part(path)
    inside = path.relative_to(base).as_posix()
    return f"{base.name}/{inside}" if base.name else inside


def find_files(dataset: str, split: str) -> TextFiles:
    """Return the files that `dataset` names. Raises NotFoundError if there are none, UsageError for unknown formats."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = _saved(path, dataset, split) or _in_folder(path, dataset, split)
    elif _is_glob(dataset) and not path.exists():
        files = _matching(path, dataset)
    else:
        return TextFiles(path.name, (_text_file(path.name, path, dataset),), single=True)
    kinds = {file.format.ending: file for file in files}
    if len({file.format.format for file in files}) > 1:
        some = " and ".join(file.name for file in list(kinds.values())[:2])
        raise UsageError(
            f"Text {dataset!r} has files of several formats, such as {some}. Give a glob such as '*.jsonl'."
        )
    return TextFiles(text_id(dataset), tuple(sorted(files, key=lambda file: file.name)))


def _is_glob(dataset: str) -> bool:
    return not dataset.startswith("builtin:") and glob.has_magic(dataset)


def _fixed_part(pattern: Path) -> Path:
    """Return the deepest folder of a pattern above its first wildcard."""
    return next(parent for parent in (pattern, *pattern.parents) if not glob.has_magic(str(parent)))


def _text_file(name: str, path: Path, dataset: str) -> TextFile:
    format = format_of(path.name)
    if format is None:
        raise UsageError(f"Text {dataset!r}{_within(name, dataset)} has no known format. Known are: {NAMES}.")
    if not name.isprintable():
        raise UsageError(f"Text {dataset!r} has a file whose name cannot be printed: {name!r}. Rename it.")
    return TextFile(name, path, format)


def _within(name: str, dataset: str) -> str:
    return "" if dataset.endswith(name) else f": file {name!r}"


def _matching(pattern: Path, dataset: str) -> list[TextFile]:
    base = _fixed_part(pattern)
    inside = {path.relative_to(base): path for path in base.glob(str(pattern.relative_to(base))) if path.is_file()}
    shown = {name: path for name, path in inside.items() if not any(part.startswith(".") for part in name.parts)}
    if not shown:
        raise NotFoundError(f"There is no text {dataset!r}: no file matches it.")
    return [_text_file(name.as_posix(), path, dataset) for name, path in shown.items()]


def _in_folder(folder: Path, dataset: str, split: str) -> list[TextFile]:
    names = [name for name in _walk(folder) if format_of(name) and name.rpartition("/")[2] not in NO_TEXT]
    if not names:
        raise NotFoundError(f"Folder {dataset!r} has no file of text. Known formats are: {NAMES}.")
    return [_text_file(name, folder / name, dataset) for name in _of_split(names, dataset, split)]


def _walk(folder: Path) -> Iterable[str]:
    """Yield the names of the files below a folder; what begins with a dot or two underscores is left out."""
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in files:
            if not name.startswith("."):
                yield (Path(top) / name).relative_to(folder).as_posix()


def _of_split(names: list[str], dataset: str, split: str) -> list[str]:
    """Return the names of a split, or all if none is named after one."""
    splits = {name: _split_of(name) for name in names}
    found = sorted({known for known in splits.values() if known})
    if not found:
        return names
    if rest := [name for name in names if splits[name] is None]:
        raise UsageError(
            f"Folder {dataset!r} has files named after splits ({', '.join(found)}) and others, such as {min(rest)}. "
            "Name the wanted files by a glob."
        )
    wanted = next((known for known, words in SPLIT_NAMES.items() if split in words), split)
    if wanted not in found:
        raise NotFoundError(f"Folder {dataset!r} has no split {split!r}. It has: {', '.join(found)}.")
    return [name for name in names if splits[name] == wanted]


def _split_of(name: str) -> str | None:
    for split, words in SPLIT_NAMES.items():
        if re.search(rf"(^|[-._ 0-9/])({'|'.join(words)})([-._ 0-9/]|$)", name):
            return split
    return None


def _saved(folder: Path, dataset: str, split: str) -> list[TextFile] | None:
    """Return the files of a folder that `save_to_disk` wrote, None if it did not."""
    if (folder / SAVED_SPLITS).is_file():
        splits: list[Any] = _json(folder / SAVED_SPLITS, dataset).get("splits", [])
        if split not in splits:
            raise NotFoundError(f"Folder {dataset!r} has no split {split!r}. It has: {', '.join(map(str, splits))}.")
        inner = _saved(folder / split, dataset, split) or []
        return [TextFile(f"{split}/{file.name}", file.path, file.format) for file in inner]
    if not (folder / SAVED).is_file():
        return None
    names = [str(entry.get("filename")) for entry in _json(folder / SAVED, dataset).get("_data_files", [])]
    return [_text_file(name, folder / Path(name).name, dataset) for name in names]


def _json(path: Path, dataset: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"Text {dataset!r} cannot be read: {path.name} is no JSON object.")
    return value
