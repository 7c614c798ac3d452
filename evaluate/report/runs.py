"""What a report needs of a run folder, read and checked once: settings, evaluations, training curves.

Everything in a run folder is data from elsewhere. It is checked here, and the rest of the report opens none of its
files.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsae.errors import CorruptError, NotFoundError
from gsae.evaluate.eval_json import EVAL, Evaluation, read_evaluation

from .curves import Curve, read_curves


@dataclass(frozen=True)
class Run:
    """A run folder's contents. cfgs: one for each of `evaluations`. missing: names of SAEs without an eval.json."""

    name: str
    config: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...]
    cfgs: tuple[Mapping[str, Any], ...]
    curves: Mapping[str, Curve]
    missing: tuple[str, ...]


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises NotFoundError where it is no run or none of its SAEs was evaluated, and CorruptError for a file that cannot
    be read as what it should be.
    """
    config_file = folder / "config.toml"
    if not config_file.is_file():
        raise NotFoundError(f"{folder} is not a run: it has no config.toml.")
    try:
        config = tomllib.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(f"{config_file} is not TOML: {error}.") from error
    saes = sorted(path for path in folder.glob("saes/*") if path.is_dir())
    if not saes:
        raise NotFoundError(f"{folder} has no SAEs yet. `gsae train` writes them to its folder saes.")
    evaluated = [path for path in saes if (path / EVAL).is_file()]
    if not evaluated:
        raise NotFoundError(f"No SAE of {folder} has been evaluated. Run `gsae eval {folder}` first.")
    both = [(read_evaluation(path / EVAL), _read_cfg(path / "cfg.json")) for path in evaluated]
    both.sort(key=lambda pair: _rank(pair[0]))
    return Run(
        name=folder.resolve().name,
        config=config,
        evaluations=tuple(evaluation for evaluation, _ in both),
        cfgs=tuple(cfg for _, cfg in both),
        curves=read_curves(folder / "metrics.jsonl"),
        missing=tuple(path.name for path in saes if path not in evaluated),
    )


def _rank(e: Evaluation) -> tuple[object, ...]:
    """Order SAEs: Gated first, then by settings. The name comes last, so that the file system's order never shows."""
    return (
        e.architecture != "gated",
        e.architecture,
        e.d_sae,
        e.l1_coefficient or 0,
        e.lr or 0,
        e.seed or 0,
        e.sae,
    )


def _read_cfg(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        cfg = json.loads(file.read_bytes())
    except ValueError as error:
        raise CorruptError(f"{file} is not JSON: {error}.") from error
    if not isinstance(cfg, dict):
        raise CorruptError(f"{file} holds {type(cfg).__name__}, not an object.")
    return cfg
