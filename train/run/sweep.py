"""The sweep syntax: one line, or one TOML table, with lists of values stands for a grid of SAEs.

`gated width=4096,8192 l1=.06,.12` is four SAEs. Every error is a `UsageError` of one line that names the setting by
the word that the user wrote.
"""

import itertools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gsae.errors import NotFoundError, UsageError
from gsae.settings import unknown
from gsae.train.architectures.registry import ARCHITECTURES

from .config import SAEConfig

# The short words of a sweep and the fields of `SAEConfig` that they set.
FIELDS = {
    "width": "d_sae",
    "l1": "l1_coefficient",
    "lr": "lr",
    "seed": "seed",
    "variant": "variant",
    "init": "init",
}
SHORT = {field: word for word, field in FIELDS.items()}
TEXTS = ("variant", "init")  # the other short words have numbers as values


def parse_sae(text: str) -> tuple[SAEConfig, ...]:
    """The SAEs of one sweep line, for example `gated width=4096,8192 l1=.06,.12 seed=0,1 lr=1e-3`.

    The first word is the architecture; comma-separated lists are the axes of a grid. Raises UsageError.
    """
    arch, *words = text.split() or [""]
    if not arch or "=" in arch:
        raise UsageError(f"An SAE begins with its architecture, as in 'gated width=4096 l1=0.1'; got {text!r}.")
    axes: dict[str, Any] = {"arch": arch}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"Expected key=value or key=value,value in {text!r}; got {word!r}.")
        if key in axes:
            raise UsageError(f"{key!r} occurs twice in {text!r}; write a list, as in {key}=1,2.")
        axes[key] = [_value(key, part) for part in value.split(",")]
    return grid(axes)


def load_sweep(path: str | Path) -> tuple[SAEConfig, ...]:
    """The SAEs of a TOML file of `[[sae]]` tables, in the order of the file; lists are the axes of a grid.

    Raises NotFoundError if there is no such file, UsageError if it has other content.
    """
    try:
        data = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise NotFoundError(f"There is no sweep file {path}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from None
    for key in data:
        if key != "sae":
            raise UsageError(f"{path}: {unknown('table', key, ['sae'])}")
    tables = data.get("sae", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path} has no [[sae]] table.")
    try:
        return tuple(sae for table in tables for sae in grid(table))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def grid(axes: Mapping[str, Any]) -> tuple[SAEConfig, ...]:
    """The SAEs of one table: every combination of the values of its lists. Raises UsageError."""
    for key in axes:
        if key not in ("arch", "name", "init_sha256", *FIELDS, *SHORT):
            raise UsageError(unknown("SAE setting", key, ["arch", *FIELDS]))
    for word, field in FIELDS.items():
        if word in axes and field in axes and word != field:
            raise UsageError(f"{word!r} and {field!r} are the same setting; give one.")
    full = {FIELDS.get(key, key): value if isinstance(value, list) else [value] for key, value in axes.items()}
    for key, values in full.items():
        if not values:
            raise UsageError(f"{key!r} has an empty list.")
    if not any(_penalised(arch) for arch in full.get("arch", [""])):
        full.setdefault("l1_coefficient", [0.0])
    for required in ("arch", "d_sae", "l1_coefficient"):
        if required not in full:
            raise UsageError(f"An SAE needs {SHORT.get(required, required)!r}, as in 'gated width=4096 l1=0.1'.")
    return tuple(_sae(dict(zip(full, point, strict=True))) for point in itertools.product(*full.values()))


def _penalised(arch: Any) -> bool:
    return not isinstance(arch, str) or arch not in ARCHITECTURES or ARCHITECTURES[arch].PENALISED


def _sae(values: dict[str, Any]) -> SAEConfig:
    try:
        return SAEConfig(**values)
    except UsageError as error:
        message = str(error)
        for field, word in SHORT.items():
            message = message.replace(f"Setting {field}:", f"Setting {word}:")
        raise UsageError(message) from None


def _value(key: str, text: str) -> int | float | str:
    if key in TEXTS:
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if key in FIELDS or key in SHORT:
        raise UsageError(f"Setting {key}: got {text!r}; needed: a number.")
    return text
