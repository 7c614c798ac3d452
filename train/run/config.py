"""What a training run is made of: the run's settings, its list of SAEs, and the sweep syntax that writes them.

Every value is checked when it is made, so a run that starts cannot fail on a setting later; every refusal is one
`UsageError`. The same settings are written to `RUN/config.toml` with all defaults resolved.
"""

import difflib
import itertools
import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gsae.errors import NotFoundError, UsageError

Architecture = Literal["gated", "relu", "rescale-shift"]
Variant = Literal["untied", "no_r_mag", "unfrozen"]
Precision = Literal["float32", "tf32", "bfloat16"]

# The sweep's short words and the fields they stand for; all but the last two are numbers.
SWEEP_KEYS = {
    "width": "d_sae",
    "l1": "l1_coefficient",
    "lr": "lr",
    "seed": "seed",
    "variant": "variant",
    "init": "init",
}
WORDS = ("variant", "init")

# The paper's learning rates, for runs as long as its own; below that many rows 1e-3 serves both (docs/training.md).
LONG_RUN_ROWS = 100_000_000
LONG_RUN_LR = {"gated": 3e-4, "relu": 1e-3, "rescale-shift": 1e-3}
SHORT_RUN_LR = 1e-3


class Settings(BaseModel):
    """A frozen set of checked values whose refusals are one-line `UsageError`s."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        unknown = sorted(set(values) - set(type(self).model_fields))
        if unknown:
            raise UsageError(_unknown("setting", unknown[0], type(self).model_fields))
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            short = {long: word for word, long in SWEEP_KEYS.items()}.get(field, field)
            reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
            subject = f"{short} = {first['input']!r}: " if field else ""
            raise UsageError(f"{subject}{reason.rstrip('.')}.") from None


class SAEConfig(Settings):
    """One SAE of a run. `lr=None` takes the run's, or the recipe's; `name=None` is filled in by the run.

    init: folder of a saved SAE to go on from; init_sha256: of its weights, filled in at the run's first start.
    """

    arch: Architecture
    d_sae: int = Field(ge=1)
    l1_coefficient: float = Field(ge=0)  # lambda of Rajamanoharan et al. 2024, eq. 8, on inputs with E||z||^2 = 1
    lr: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    variant: Variant | None = None
    init: str | None = None
    init_sha256: str | None = None
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=200)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.variant is not None and self.arch != "gated":
            raise ValueError(f"variant = {self.variant}: only gated has variants, not {self.arch}")
        return self

    @property
    def kind(self) -> str:
        """Its architecture with its variant, as `sae.PARAMS` names them."""
        return f"{self.arch}-{self.variant}" if self.variant else self.arch


class RunConfig(Settings):
    """A run: one site, one stream of batches, any number of SAEs. Steps and warm-ups are counted in batches.

    What is None is decided at the first start and written to config.toml.
    """

    site: str
    batch_size: int = Field(default=4096, ge=1)
    steps: int = Field(ge=1)
    data_seed: int = Field(default=0, ge=0, lt=2**63)
    lr: float | None = Field(default=None, gt=0)  # None: the recipe's, an architecture
    lr_warm_up_steps: int = Field(default=100, ge=0)
    l1_warm_up_steps: int | None = Field(default=None, ge=0)  # None: a tenth of the steps
    lr_decay_steps: int | None = Field(default=None, ge=0)  # None: the last fifth of the steps, linearly to 0
    adam_betas: tuple[float, float] = (0.0, 0.999)
    adam_eps: float = Field(default=1e-8, gt=0)
    clip_grad_norm: float | None = Field(default=None, gt=0)  # of all gradients of an SAE together
    resample_at: tuple[int, ...] = ()  # steps after which silent latents are given new directions
    resample_silent_rows: int | None = Field(default=None, ge=1)  # None: half the least distance of two such steps
    resample_warm_up_steps: int = Field(default=1000, ge=1)
    resample_bias: Literal["density", "zero"] = "density"
    max_norm_multiple: float = Field(default=10.0, ge=0)
    skip_nonfinite: bool = False
    precision: Precision = "float32"
    screening: bool | None = None
    device: str | None = None
    threads: int | None = Field(default=None, ge=1)
    stack: int | None = Field(default=None, ge=1)  # SAEs of one shape that are trained as one product, at most
    checkpoint_every: int = Field(default=1000, ge=1)
    checkpoint_minutes: float = Field(default=10.0, gt=0)
    log_every: int = Field(default=50, ge=1)
    eval_every: int = Field(default=500, ge=0)  # 0: never
    eval_rows: int = Field(default=2048, ge=1)
    saes: tuple[SAEConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.adam_betas[0] != 0:
            raise ValueError(
                f"adam_betas = {self.adam_betas}: the first must be 0, as in the paper (no first moment is kept)"
            )
        if not 0 < self.adam_betas[1] < 1:
            raise ValueError(f"adam_betas = {self.adam_betas}: the second must lie between 0 and 1")
        steps = self.resample_at
        if list(steps) != sorted(set(steps)) or not all(0 < step < self.steps for step in steps):
            raise ValueError(f"resample_at = {steps}: give ascending steps between 0 and {self.steps}")
        for sae in self.saes:
            if sae.arch == "rescale-shift" and sae.init is None:
                raise ValueError("a rescale-shift SAE starts from a trained baseline: give init, the folder of one")
        self.named_saes()
        return self

    def lr_of(self, sae: SAEConfig) -> float:
        """The learning rate of an SAE: its own, the run's, or the recipe's for as many rows."""
        recipe = LONG_RUN_LR[sae.arch] if self.steps * self.batch_size >= LONG_RUN_ROWS else SHORT_RUN_LR
        return sae.lr or self.lr or recipe

    def named_saes(self) -> tuple[SAEConfig, ...]:
        """The SAEs with learning rate and name filled in; UsageError where two are the same or share a name."""
        saes = [sae.model_copy(update={"lr": self.lr_of(sae)}) for sae in self.saes]
        alike = Counter(sae.model_copy(update={"name": None}) for sae in saes)
        for sae, count in alike.items():
            if count > 1:
                raise UsageError(f"{_short_name(sae)} (lr {sae.lr:g}) is listed {count} times; list it once.")
        shared = Counter(_short_name(sae) for sae in saes)
        named = [sae.model_copy(update={"name": sae.name or _name(sae, shared)}) for sae in saes]
        for name, count in Counter(sae.name for sae in named).items():
            if count > 1:
                raise UsageError(f"{count} SAEs of the run are called {name!r}; give each a name of its own.")
        return tuple(named)

    def resolved(self, *, device: str, threads: int, ranks: int = 1, screening: bool = False) -> "RunConfig":
        """The same run with every default written out; the arguments stand in where nothing was asked for.

        ranks: how many processes there are to work off the groups, each of which should find one.
        """
        decay, warm_up, saes = self.lr_decay_steps, self.l1_warm_up_steps, self.named_saes()
        gaps = [b - a for a, b in itertools.pairwise((0, *self.resample_at))]
        silent = self.batch_size * (min(gaps) // 2) if gaps else None
        return self.model_copy(
            update={
                "l1_warm_up_steps": -(-self.steps // 10) if warm_up is None else warm_up,
                "lr_decay_steps": self.steps // 5 if decay is None else decay,
                "resample_silent_rows": self.resample_silent_rows or silent,
                "device": self.device or device,
                "threads": self.threads or threads,
                "stack": self.stack or _stack_for(saes, ranks),
                "screening": screening if self.screening is None else self.screening,
                "saes": saes,
            }
        )

    def groups(self) -> tuple[tuple[SAEConfig, ...], ...]:
        """The stacks of SAEs of one shape, at most `stack` in each, that are trained one by one or side by side."""
        return _stacks(self.named_saes(), self.stack or len(self.saes))


def _stacks(saes: Sequence[SAEConfig], most: int) -> tuple[tuple[SAEConfig, ...], ...]:
    shapes: dict[tuple[str, int], list[SAEConfig]] = {}
    for sae in saes:
        shapes.setdefault((sae.kind, sae.d_sae), []).append(sae)
    found = []
    for alike in shapes.values():
        parts = -(-len(alike) // most)
        ends = [len(alike) * part // parts for part in range(parts + 1)]
        found += [tuple(alike[a:b]) for a, b in itertools.pairwise(ends)]
    return tuple(found)


def _stack_for(saes: Sequence[SAEConfig], ranks: int) -> int:
    """The largest stacks that leave no rank without one."""
    return next((most for most in range(len(saes), 1, -1) if len(_stacks(saes, most)) >= ranks), 1)


def _short_name(sae: SAEConfig) -> str:
    return f"{sae.kind}-w{sae.d_sae}-l1_{sae.l1_coefficient:g}-seed{sae.seed}"


def _name(sae: SAEConfig, shared: Mapping[str, int]) -> str:
    short = _short_name(sae)
    return f"{short}-lr_{sae.lr:g}" if shared[short] > 1 else short


def _unknown(what: str, key: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"Unknown {what} {key!r}; did you mean {near[0]!r}? There are: {', '.join(known)}."


# -- sweeps


def parse_sae(text: str) -> tuple[SAEConfig, ...]:
    """The SAEs that one sweep line stands for, e.g. `gated width=4096,8192 l1=.06,.12 seed=0,1 lr=1e-3`.

    The first word is the architecture; comma lists are the axes of a grid. Raises UsageError.
    """
    arch, *words = text.split() or [""]
    if not arch or "=" in arch:
        raise UsageError(f"An SAE begins with its architecture, as in 'gated width=4096 l1=0.1'; got {text!r}.")
    axes: dict[str, Any] = {"arch": arch}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"Expected key=value (or key=value,value) in {text!r}, got {word!r}.")
        if key in axes:
            raise UsageError(f"{key!r} stands twice in {text!r}; write a list, as in {key}=1,2.")
        axes[key] = [_number(key, part) for part in value.split(",")]
    return _grid(axes)


def load_sweep(path: str | Path) -> tuple[SAEConfig, ...]:
    """The SAEs of a TOML file of `[[sae]]` tables, in which lists are the axes of a grid, in the file's order.

    Raises NotFoundError without the file, UsageError where it is no such TOML.
    """
    try:
        data = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise NotFoundError(f"There is no sweep file {path}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from None
    for key in data:
        if key != "sae":
            raise UsageError(f"{path}: {_unknown('table', key, ['sae'])}")
    tables = data.get("sae", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path} has no [[sae]] table.")
    try:
        return tuple(sae for table in tables for sae in _grid(table))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _grid(axes: Mapping[str, Any]) -> tuple[SAEConfig, ...]:
    for key in axes:
        if key not in ("arch", "name", "init_sha256", *SWEEP_KEYS, *SWEEP_KEYS.values()):
            raise UsageError(_unknown("SAE setting", key, ["arch", *SWEEP_KEYS]))
    for word, field in SWEEP_KEYS.items():
        if word in axes and field in axes and word != field:
            raise UsageError(f"{word!r} and {field!r} are the same setting; give one.")
    full = {SWEEP_KEYS.get(key, key): value if isinstance(value, list) else [value] for key, value in axes.items()}
    for key, values in full.items():
        if not values:
            raise UsageError(f"{key!r} has an empty list.")
    if full.get("arch") == ["rescale-shift"]:
        full.setdefault("l1_coefficient", [0.0])  # it has no penalty
    for required in ("arch", "d_sae", "l1_coefficient"):
        if required not in full:
            short = {long: word for word, long in SWEEP_KEYS.items()}.get(required, required)
            raise UsageError(f"An SAE needs {short!r}, as in 'gated width=4096 l1=0.1'.")
    return tuple(SAEConfig(**dict(zip(full, point, strict=True))) for point in itertools.product(*full.values()))


def _number(key: str, text: str) -> int | float | str:
    if key in WORDS:
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if key in SWEEP_KEYS or key in SWEEP_KEYS.values():
        raise UsageError(f"{key} = {text!r} is not a number.")
    return text


# -- RUN/config.toml


def to_toml(config: RunConfig, store: Mapping[str, Any]) -> str:
    """`RUN/config.toml`: the run's settings, a `[store]` table (paths, digest), and one `[[sae]]` table an SAE."""
    lines = [f"{key} = {_toml(value)}" for key, value in config if key != "saes" and value is not None]
    lines += ["", "[store]", *(f"{key} = {_toml(value)}" for key, value in store.items())]
    short = {long: word for word, long in SWEEP_KEYS.items()}
    for sae in config.saes:
        lines += ["", "[[sae]]", *(f"{short.get(k, k)} = {_toml(v)}" for k, v in sae if v is not None)]
    return "\n".join(lines) + "\n"


def from_toml(text: str) -> tuple[RunConfig, dict[str, Any]]:
    """What `to_toml` wrote: the settings and the `[store]` table. Raises UsageError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"config.toml cannot be read: {error}") from None
    store, saes = data.pop("store", None), data.pop("sae", None)
    if not isinstance(store, dict) or "digest" not in store or not isinstance(saes, list):
        raise UsageError("config.toml has no [store] digest or no [[sae]] table.")
    return RunConfig(**data, saes=tuple(sae for table in saes for sae in _grid(table))), store


def _toml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    # A JSON string is a TOML string once DEL, which TOML wants escaped, is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
