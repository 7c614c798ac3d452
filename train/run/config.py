"""The settings of a training run and of its SAEs: each is declared once, with its default, limits and help text.

Values are checked when they are made, so a run that has started cannot fail on a setting. Settings that are None are
decided at the first start of the run (`RunConfig.resolved`) and written to `RUN/config.toml`.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import field_validator, model_validator

from gsae.errors import UsageError
from gsae.settings import Settings, setting
from gsae.train.architectures.base import DEFAULT_LR, Params
from gsae.train.architectures.registry import ARCHITECTURES, base_names, variants

Precision = Literal["float32", "tf32", "bfloat16"]

LONG_RUN_ROWS = 100_000_000  # training rows from which on the paper's learning rates are the default (docs/training.md)

NEEDED, RATES, RESAMPLING = "What one needs", "Start, steps and rates", "Resampling of silent latents"
DATA, SAVING, MACHINE = "Data", "Checkpoints and metrics", "Machine"


class SAEConfig(Settings):
    """One SAE of a run."""

    arch: str = setting(..., "Architecture: gated, relu or rescale-shift.")
    d_sae: int = setting(..., "Number of latents.", ge=1)
    l1_coefficient: float = setting(
        ...,
        "Sparsity coefficient: lambda of Rajamanoharan et al. 2024, eq. 8, for inputs scaled to E||x||^2 = 1.",
        ge=0,
    )
    lr: float | None = setting(None, "Learning rate. Default: that of the run.", gt=0)
    seed: int = setting(0, "Seed of the initial weights.", ge=0, lt=2**63)
    variant: str | None = setting(None, "Ablation of the Gated SAE: untied, no_r_mag or unfrozen.")
    init: str | None = setting(None, "Folder of a saved SAE, RUN/saes/NAME, to start from.")
    init_sha256: str | None = setting(
        None, "SHA-256 of the weights in `init`. The run records it when it starts, to notice if they change."
    )
    name: str | None = setting(
        None,
        "Name of the SAE's folder. Default: made from the settings.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$",
        max_length=200,
    )

    @field_validator("arch")
    @classmethod
    def _known(cls, arch: str) -> str:
        if arch not in base_names():
            raise ValueError(f"one of {', '.join(base_names())}")
        return arch

    @model_validator(mode="after")
    def _checked(self) -> Self:
        known = variants(self.arch)
        if self.variant is not None and self.variant not in known:
            needed = f"one of {', '.join(known)}" if known else f"none, because {self.arch} has no variants"
            raise UsageError(f"Setting variant: got {self.variant!r}; needed: {needed}.")
        return self

    @property
    def kind(self) -> str:
        """Its architecture with its variant: a key of `ARCHITECTURES`."""
        return f"{self.arch}-{self.variant}" if self.variant else self.arch

    @property
    def architecture(self) -> type[Params]:
        """The class of its parameters."""
        return ARCHITECTURES[self.kind]


class ResolvedSAE(SAEConfig):
    """One SAE of a run whose defaults are filled in."""

    lr: float
    name: str


class RunConfig(Settings):
    """A training run: one site, one stream of batches, any number of SAEs. Steps are counted in batches.

    A field without a panel is not an option of the command line: `saes` is made from `--sae` or `--config`, the others
    are for Python callers.
    """

    site: str = setting(..., "Site of the stores to train on, for example mlp.10.", panel=NEEDED)
    batch_size: int = setting(4096, "Rows per batch.", panel=RATES, ge=1)
    steps: int = setting(..., "Number of batches to train on.", panel=NEEDED, ge=1)
    data_seed: int = setting(0, "Seed of the order of rows.", panel=DATA, ge=0, lt=2**63)
    lr: float | None = setting(
        None,
        "Learning rate of SAEs that set none. Default: 1e-3; from 1e8 training rows on the paper's, "
        "3e-4 for gated and 1e-3 for relu.",
        panel=RATES,
        gt=0,
    )
    lr_warm_up_steps: int = setting(100, "Steps over which the learning rate rises linearly.", panel=RATES, ge=0)
    l1_warm_up_steps: int | None = setting(
        None,
        "Steps over which the sparsity coefficient rises linearly. Default: a tenth of the steps.",
        panel=RATES,
        ge=0,
    )
    lr_decay_steps: int | None = setting(
        None,
        "Last steps, over which the learning rate falls linearly to 0. Default: a fifth of the steps.",
        panel=RATES,
        ge=0,
    )
    adam_betas: tuple[float, float] = setting((0.0, 0.999), "Adam's betas. The first must be 0, as in the paper.")
    adam_eps: float = setting(1e-8, "Adam's epsilon.", gt=0)
    clip_grad_norm: float | None = setting(
        None,
        "Largest norm of all gradients of an SAE together; larger gradients are scaled down. Makes steps slower. "
        "Default: no clipping.",
        panel=RATES,
        gt=0,
    )
    resample_at: tuple[int, ...] = setting(
        (),
        "Steps after which latents that no longer fire get new directions, for example 5000,10000. Default: never.",
        panel=RESAMPLING,
        metavar="STEPS",
    )
    resample_silent_rows: int | None = setting(
        None,
        "Rows without a firing before a latent is resampled. Default: half the smallest gap between resampling steps.",
        panel=RESAMPLING,
        ge=1,
    )
    resample_warm_up_steps: int = setting(1000, "Steps over which the learning rate recovers after a resampling.", ge=1)
    resample_bias: Literal["density", "zero"] = setting(
        "density",
        "Gate bias of resampled latents: density (they fire as often as the median latent) or zero (as in the paper).",
        panel=RESAMPLING,
    )
    max_norm_multiple: float = setting(
        10.0,
        "Rows with a norm over this multiple of the median norm are left out; 0 keeps all rows.",
        panel=DATA,
        ge=0,
    )
    skip_nonfinite: bool = setting(
        False,
        "Leave out rows with a NaN or an infinity. Without it such rows are an error.",
        panel=DATA,
        flags="--skip-nonfinite",
    )
    precision: Precision = setting(
        "float32",
        "Type of the matrix products' operands: float32, tf32 (GPU only) or bfloat16. Weights stay float32.",
        panel=MACHINE,
    )
    screening: bool | None = setting(
        None,
        "Find open gates by a bfloat16 product first; the gates found are exact. "
        "Default: on CPUs with bfloat16 instructions.",
        panel=MACHINE,
        flags="--screening/--no-screening",
    )
    device: str = setting("auto", "Device: cpu, cuda, or auto for cuda if there is a GPU.", panel=MACHINE)
    threads: int | None = setting(
        None, "CPU threads. Default: all cores, divided by the number of ranks.", panel=MACHINE, ge=1
    )
    stack: int | None = setting(
        None,
        "Largest number of SAEs of one shape that are trained together. Smaller stacks give more ranks work. "
        "Default: as many as leave no rank idle.",
        panel=MACHINE,
        ge=1,
    )
    checkpoint_every: int = setting(1000, "Steps between checkpoints.", panel=SAVING, ge=1)
    checkpoint_minutes: float = setting(10.0, "Largest number of minutes between checkpoints.", panel=SAVING, gt=0)
    log_every: int = setting(50, "Steps between lines of metrics.jsonl.", panel=SAVING, ge=1)
    eval_every: int = setting(500, "Steps between measurements on held-out rows; 0 for none.", panel=SAVING, ge=0)
    eval_rows: int = setting(2048, "Held-out rows of such a measurement.", ge=1)
    init: str | None = setting(
        None,
        "Folder of a saved SAE, RUN/saes/NAME, to start from, for SAEs that set no init. "
        "Default: random initial weights.",
        panel=RATES,
    )
    saes: tuple[SAEConfig, ...] = setting(..., "The SAEs of the run.", min_length=1)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        first, second = self.adam_betas
        if first != 0:
            raise UsageError(
                f"Setting adam_betas: got {self.adam_betas}; the first must be 0, because no first moment is kept."
            )
        if not 0 < second < 1:
            raise UsageError(f"Setting adam_betas: got {self.adam_betas}; the second must be between 0 and 1.")
        at = self.resample_at
        if list(at) != sorted(set(at)) or not all(0 < step < self.steps for step in at):
            raise UsageError(f"Setting resample_at: got {at}; needed: ascending steps between 0 and {self.steps}.")
        for sae in self.saes:
            if sae.architecture.STARTS_FROM_SAVED and not (sae.init or self.init):
                raise UsageError(f"A {sae.kind} SAE starts from a trained SAE: set init to the folder of one.")
        self.named_saes()
        return self

    def lr_of(self, sae: SAEConfig) -> float:
        """The learning rate of an SAE: its own, the run's, or the default for the number of training rows."""
        default = sae.architecture.LONG_RUN_LR if self.steps * self.batch_size >= LONG_RUN_ROWS else DEFAULT_LR
        return sae.lr or self.lr or default

    def named_saes(self) -> tuple[ResolvedSAE, ...]:
        """The SAEs with learning rate, init and name filled in.

        Raises UsageError if two SAEs are equal or have the same name.
        """
        saes = [sae.model_copy(update={"lr": self.lr_of(sae), "init": sae.init or self.init}) for sae in self.saes]
        alike = Counter(sae.model_copy(update={"name": None}) for sae in saes)
        for sae, count in alike.items():
            if count > 1:
                raise UsageError(f"{_short_name(sae)} (lr {sae.lr:g}) is listed {count} times; list it once.")
        shared = Counter(_short_name(sae) for sae in saes)
        named = [ResolvedSAE(**(dict(sae) | {"name": sae.name or _name(sae, shared)})) for sae in saes]
        for name, count in Counter(sae.name for sae in named).items():
            if count > 1:
                raise UsageError(f"{count} SAEs of the run are called {name!r}; give each a different name.")
        return tuple(named)

    def resolved(self, *, device: str, threads: int, ranks: int = 1, screening: bool = False) -> "ResolvedRun":
        """The same run with every default filled in; the arguments are used where the settings leave it open.

        ranks: number of processes that share the groups; stacks are cut so that each finds one.
        """
        decay, warm_up, saes = self.lr_decay_steps, self.l1_warm_up_steps, self.named_saes()
        gaps = [b - a for a, b in itertools.pairwise((0, *self.resample_at))]
        silent = self.batch_size * (min(gaps) // 2) if gaps else None
        filled_in = {
            "l1_warm_up_steps": -(-self.steps // 10) if warm_up is None else warm_up,
            "lr_decay_steps": self.steps // 5 if decay is None else decay,
            "resample_silent_rows": self.resample_silent_rows or silent,
            "device": device if self.device == "auto" else self.device,
            "threads": self.threads or threads,
            "stack": self.stack or _stack_for(saes, ranks),
            "screening": screening if self.screening is None else self.screening,
            "init": None,  # the SAEs have it
            "saes": saes,
        }
        return ResolvedRun(**(dict(self) | filled_in))


class ResolvedRun(RunConfig):
    """A run whose defaults are filled in: what is trained, and what `RUN/config.toml` records."""

    l1_warm_up_steps: int
    lr_decay_steps: int
    screening: bool
    threads: int
    stack: int
    saes: tuple[ResolvedSAE, ...]

    @property
    def silent_rows(self) -> int:
        """Rows without a firing before a latent is resampled."""
        return self.resample_silent_rows or 2**63 - 1  # None if there are no resampling steps

    def groups(self) -> tuple[tuple[ResolvedSAE, ...], ...]:
        """The groups of the run: SAEs of one shape, at most `stack` in each."""
        return _stacks(self.saes, self.stack)


def _stacks(saes: Sequence[ResolvedSAE], most: int) -> tuple[tuple[ResolvedSAE, ...], ...]:
    shapes: dict[tuple[str, int], list[ResolvedSAE]] = {}
    for sae in saes:
        shapes.setdefault((sae.kind, sae.d_sae), []).append(sae)
    found = []
    for alike in shapes.values():
        parts = -(-len(alike) // most)
        ends = [len(alike) * part // parts for part in range(parts + 1)]
        found += [tuple(alike[a:b]) for a, b in itertools.pairwise(ends)]
    return tuple(found)


def _stack_for(saes: Sequence[ResolvedSAE], ranks: int) -> int:
    """The largest stack size that gives every rank a group."""
    return next((most for most in range(len(saes), 1, -1) if len(_stacks(saes, most)) >= ranks), 1)


def _short_name(sae: SAEConfig) -> str:
    return f"{sae.kind}-w{sae.d_sae}-l1_{sae.l1_coefficient:g}-seed{sae.seed}"


def _name(sae: SAEConfig, shared: Mapping[str, int]) -> str:
    short = _short_name(sae)
    return f"{short}-lr_{sae.lr:g}" if shared[short] > 1 else short
