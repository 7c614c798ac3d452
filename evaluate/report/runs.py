"""What a report needs of a run folder, read and checked once: settings, figures, training curves.

Everything in a run folder is data from elsewhere, so figures are validated here and nothing else opens its
files. Curves are thinned while they are read: a long run's metrics.jsonl may be larger than memory should
hold.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from gsae.errors import CorruptError, NotFoundError

METRICS = ("l0", "explained_variance", "gamma", "dead", "loss")
MAX_POINTS = 200


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Figure = Annotated[float | None, AfterValidator(_finite)]


class Density(BaseModel):
    """How many latents fire on which share of the rows; `latents` has a count for each pair of edges."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    log10_edges: tuple[float, ...]
    latents: tuple[int, ...]
    silent: int

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if len(self.log10_edges) != len(self.latents) + 1:
            raise ValueError("latents need one edge more than they have bins")
        return self


class Evaluation(BaseModel):
    """The part of an eval.json that is shown; a figure that is missing or not finite is None."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sae: str
    architecture: str
    d_sae: int
    site: str
    store_digest: str
    rows: int
    l1_coefficient: Figure = None
    lr: Figure = None
    seed: int | None = None
    l0: Figure = None
    explained_variance: Figure = None
    mse: Figure = None
    gamma: Figure = None
    gamma_centred: Figure = None
    dead: Figure = None
    silent: Figure = None
    dense: Figure = None
    cossim: Figure = None
    l2_ratio: Figure = None
    ce_loss_score: Figure = None
    ce_loss_score_mean: Figure = None
    ce_loss_score_all_positions: Figure = None
    kl_div_score: Figure = None
    density: Density | None = None
    standard_errors: dict[str, Figure] = {}
    per_context: dict[str, list[float | None] | None] | None = None


@dataclass(frozen=True)
class Curve:
    """One SAE's training curve: columns of equal length, `step` and those of `METRICS` that were logged."""

    step: tuple[int, ...]
    values: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class Run:
    """A run folder's contents. `cfgs` stand beside `evaluations`; `missing` names SAEs without an
    eval.json."""

    name: str
    config: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...]
    cfgs: tuple[Mapping[str, Any], ...]
    curves: Mapping[str, Curve]
    missing: tuple[str, ...]


def read_run(folder: Path) -> Run:
    """Read RUN. NotFoundError where it is no run or none of its SAEs was evaluated, CorruptError for a bad
    file."""
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
    evaluated = [path for path in saes if (path / "eval.json").is_file()]
    if not evaluated:
        raise NotFoundError(f"No SAE of {folder} has been evaluated. Run `gsae eval {folder}` first.")
    both = [(_evaluation(path / "eval.json"), _cfg(path / "cfg.json")) for path in evaluated]
    both.sort(key=lambda pair: _rank(pair[0]))
    return Run(
        name=folder.resolve().name,
        config=config,
        evaluations=tuple(evaluation for evaluation, _ in both),
        cfgs=tuple(cfg for _, cfg in both),
        curves=_curves(folder / "metrics.jsonl"),
        missing=tuple(path.name for path in saes if path not in evaluated),
    )


def _rank(e: Evaluation) -> tuple[object, ...]:
    """Gated first, then by what was set; names last, so that the file system's order never shows."""
    return (
        e.architecture != "gated",
        e.architecture,
        e.d_sae,
        e.l1_coefficient or 0,
        e.lr or 0,
        e.seed or 0,
        e.sae,
    )


def _evaluation(file: Path) -> Evaluation:
    try:
        return Evaluation.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CorruptError(f"{file}: {where}: {first['msg']}. `gsae eval` writes it again.") from error


def _cfg(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        cfg = json.loads(file.read_bytes())
    except ValueError as error:
        raise CorruptError(f"{file} is not JSON: {error}.") from error
    if not isinstance(cfg, dict):
        raise CorruptError(f"{file} holds {type(cfg).__name__}, not an object.")
    return cfg


class _Thinned:
    """A curve of unknown length kept at `MAX_POINTS` to twice as many points: when full, every other one
    goes."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}
        self.seen = 0
        self.stride = 1

    def add(self, line: dict[str, Any]) -> None:
        if self.seen % self.stride == 0:
            self.lines.append(line)
        if len(self.lines) == 2 * MAX_POINTS:
            self.lines = self.lines[::2]
            self.stride *= 2
        self.seen += 1
        self.last = line

    def curve(self) -> Curve:
        lines = self.lines if self.lines[-1] is self.last else [*self.lines, self.last]
        logged = [name for name in METRICS if any(name in line for line in lines)]
        return thin(
            Curve(
                step=tuple(int(line["step"]) for line in lines),
                values={name: tuple(_number(line.get(name)) for line in lines) for name in logged},
            ),
            MAX_POINTS,
        )


def thin(curve: Curve, points: int) -> Curve:
    """At most `points` of the curve's points, evenly spaced, with its first and last; 0 leaves nothing."""
    n = len(curve.step)
    if n <= points:
        return curve
    at = [round(i * (n - 1) / (points - 1)) for i in range(points)] if points > 1 else []
    return Curve(
        step=tuple(curve.step[i] for i in at),
        values={name: tuple(column[i] for i in at) for name, column in curve.values.items()},
    )


def _number(value: object) -> float | None:
    return _finite(value) if isinstance(value, (int, float)) else None


def _curves(file: Path) -> dict[str, Curve]:
    """By SAE. A torn last line, of a run that is still writing, is left out."""
    if not file.is_file():
        return {}
    found: dict[str, _Thinned] = {}
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
                name, _ = str(line["sae"]), int(line["step"])
            except (ValueError, KeyError, TypeError) as error:
                if not text.endswith("\n"):
                    break
                raise CorruptError(f"{file}, line {number}: no metrics with `sae` and `step`.") from error
            found.setdefault(name, _Thinned()).add(line)
    return {name: thinned.curve() for name, thinned in found.items()}
