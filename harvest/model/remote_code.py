"""Code that a model brings: which files it is, their hashes, and that nothing else of it has run.

A model folder may name classes in its own Python files (`auto_map`). transformers runs them only with the user's
consent, `--trust-remote-code`; without it nothing is imported and nobody is asked. Hashing costs nothing noticeable.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gsae.errors import IncompatibleError, NotFoundError, UsageError
from gsae.files import hash_file
from gsae.harvest.hub import one_line

from .model_files import ModelFiles

CONFIGS = ("config.json", "tokenizer_config.json")
# transformers imports it with the model, if it is there.
GENERATION = "custom_generate"
# Where transformers imports a model's code.
PACKAGE = "transformers_modules"
ADAPTER = "adapter"  # stands for the folder of an adapter in the paths of files


def trusted_code(files: ModelFiles, trusted: bool) -> dict[str, str]:
    """Return the sha256 of each Python file that a model's code consists of, by its path; empty if not `trusted`.

    For an adapter, of the base, and of the adapter's folder if the tokenizer is there. Empty if the model has no code.
    Raises UsageError if the code is in another repository of the Hub, NotFoundError if a file of it is missing.
    """
    found: dict[str, str] = {}
    for owner in dict.fromkeys((files.whole, files.tokenizer)) if trusted else ():
        if owner.is_gguf:
            continue
        for path in _code_files(owner):
            name = path.relative_to(owner.path.resolve()).as_posix()
            name = name if owner is files.whole else f"{ADAPTER}/{name}"
            found[name] = hash_file(path)
    return dict(sorted(found.items()))


def check_same_code(found: Mapping[str, str], planned: Mapping[str, str], model: str) -> None:
    """Raise IncompatibleError if the code of a model is not the code that a store was made with."""
    changed = sorted(name for name in found.keys() | planned.keys() if found.get(name) != planned.get(name))
    if changed:
        raise IncompatibleError(
            f"Model {model!r} has other code than the store was made with: {changed[0]} differs. It was not run."
        )


def check_executed(objects: Iterable[Any], allowed: Mapping[str, str], model: str) -> None:
    """Raise IncompatibleError if the class of one of `objects` is from code of a model without a hash in `allowed`."""
    modules = {type(each).__module__ for each in objects}
    for name in sorted(name for name in modules if name.split(".")[0] == PACKAGE):
        file = Path(str(getattr(sys.modules.get(name), "__file__", "")))
        ran = hash_file(file) if file.is_file() else None
        if ran not in allowed.values():
            raise IncompatibleError(f"The code of model {model!r} changed while it was loaded: {file.name}. Try again.")


def refusal(files: ModelFiles, error: BaseException) -> UsageError | None:
    """Return the error for a model that needs its code, if `error` says that its code was not to be run."""
    if "trust_remote_code" not in str(error):
        return None
    return UsageError(
        f"Model {files.id!r} needs code from its own files. Read the .py files in {str(files.whole.path)!r}, then run "
        "the command again with --trust-remote-code."
    )


def _code_files(files: ModelFiles) -> list[Path]:
    """Return the files that the model's auto_map names, and those that they import."""
    from transformers.dynamic_module_utils import get_relative_import_files

    folder = files.path.resolve()
    named = [folder / f"{name}.py" for name in sorted(set(_module_names(files)))]
    found = {path for path in named if path.is_file()}
    if named and not found:
        raise NotFoundError(f"The code of model {files.id!r} is not in its folder: it has no {named[0].name}.")
    try:
        for path in sorted(found):
            found |= {Path(each) for each in get_relative_import_files(path)}
    except FileNotFoundError as error:
        raise NotFoundError(f"The code of model {files.id!r} is not complete: {one_line(error)}.") from None
    if found:
        found |= set((folder / GENERATION).rglob("*.py"))
    return sorted(path for path in found if path.is_file() and path.is_relative_to(folder))


def _module_names(files: ModelFiles) -> Iterator[str]:
    for config in CONFIGS:
        for reference in _references(files.path / config):
            owner, _, name = reference.rpartition("--")
            if owner:
                raise UsageError(
                    f"The code of model {files.id!r} is in another repository, {owner!r}. Put its .py files into the "
                    f"model's folder and delete '{owner}--' in {config}."
                )
            yield name.split(".")[0]


def _references(path: Path) -> Iterator[str]:
    """Yield the classes in a config's auto_map, as transformers writes them: `module.Class`, alone or in a list."""
    try:
        config = json.loads(path.read_text()) if path.is_file() else None
    except ValueError:  # transformers says what is wrong in it
        config = None
    auto_map = config.get("auto_map") if isinstance(config, dict) else None
    for value in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str):
                yield reference
