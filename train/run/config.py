"""The settings of a training run and of its SAEs: each is declared once, with its default, limits and help text.

Values are checked when they are made, so a run that has started cannot fail on a setting. Settings that are None are
decided at the first start of the run (`RunConfig.resolved`) and written to `RUN/config.toml`.

The options of `gsae train` are made from this file, so it imports nothing heavy: the architectures are looked up when
values are checked.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import field_validator, model_validator

from gsae.errors import UsageError
from gsae.settings import NEEDED, Settings, setting

if TYPE_CHECKING:
    from gsae.train.architectures.base import Params

Precision = Literal["float32", "tf32", "bfloat16"]

LONG_RUN_ROWS = 100_000_000  # training rows from which on the default learning rate is a quarter (docs/training.md)

RATES, RESAMPLING = "Optimisation", "Resampling of silent latents"
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
        from gsae.train.architectures.registry import base_names

        if arch not in base_names():
            raise ValueError(f"one of {', '.join(base_names())}")
        return arch

    @model_validator(mode="after")
    def _checked(self) -> Self:
        from gsae.train.architectures.registry import variants

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
    def architecture(self) -> "type[Params]":
        """The class of its parameters."""
        from gsae.train.architectures.registry import ARCHITECTURES

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

    site: str = setting(..., "Site of the stores to train on, for example mlp.10.", panel=NEEDED, metavar="SITE")
    batch_size: int = setting(4096, "Rows per batch.", panel=NEEDED, metavar="ROWS", ge=1)
    steps: int = setting(..., "Number of batches to train on.", panel=NEEDED, metavar="BATCHES", ge=1)
    data_seed: int = setting(0, "Seed of the order of rows.", panel=DATA, metavar="SEED", ge=0, lt=2**63)
    lr: float | None = setting(
        None,
        "Learning rate of SAEs that set none. Default: 2e-3, times sqrt(4096 / d_sae) for more than 4,096 latents; "
        "a quarter of it from 1e8 training rows on.",
        panel=RATES,
        metavar="RATE",
        gt=0,
    )
    lr_warm_up_steps: int | None = setting(
        None,
        "Steps over which the learning rate rises linearly. Default: a tenth of the steps, at most 1,000.",
        panel=RATES,
        metavar="STEPS",
        ge=0,
    )
    l1_warm_up_steps: int | None = setting(
        None,
        "Steps over which the sparsity coefficient rises linearly. Default: a tenth of the steps.",
        panel=RATES,
        metavar="STEPS",
        ge=0,
    )
    lr_decay_steps: int | None = setting(
        None,
        "Last steps, over which the learning rate falls linearly to 0. Default: a fifth of the steps.",
        panel=RATES,
        metavar="STEPS",
        ge=0,
    )
    adam_betas: tuple[float, float] = setting((0.0, 0.999), "Adam's betas. The first must be 0, as in the paper.")
    adam_eps: float | None = setting(
        None,
        "Adam's epsilon, for gradients of inputs with E||x||^2 = 1. Default: 6e-10; 1e-8 without the row clip.",
        gt=0,
    )
    row_clip: bool | None = setting(
        None,
        "Bound the step of each latent's row of weights: its root mean square is at most the learning rate. "
        "Default: on.",
        panel=RATES,
        flags="--row-clip/--no-row-clip",
    )
    encoder_start: Literal["scaled", "unit"] | None = setting(
        None,
        "Norm of the encoder's rows at the start: scaled (2 d_in / d_sae, at most 1, so that the first reconstruction "
        "is not larger than its input) or unit (as the decoder's). Default: scaled.",
        panel=RATES,
    )
    clip_grad_norm: float | None = setting(
        None,
        "Largest norm of all gradients of an SAE together; larger gradients are scaled down. Makes steps slower. "
        "Default: no clipping.",
        panel=RATES,
        metavar="NORM",
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
        metavar="ROWS",
        ge=1,
    )
    resample_warm_up_steps: int = setting(1000, "Steps over which the learning rate recovers after a resampling.", ge=1)
    resample_bias: Literal["density", "zero"] = setting(
        "density",
        "Gate bias of resampled latents: density (they fire as often as the median latent) or zero (as in the paper).",
        panel=RESAMPLING,
    )
    resample_norm_multiple: float | None = setting(
        None,
        "New directions are drawn from rows below this multiple of the median norm; 0: from all. Default: 3.",
        ge=0,
    )
    max_norm_multiple: float = setting(
        10.0,
        "Rows with a norm over this multiple of the median norm are left out; 0 keeps all rows.",
        panel=DATA,
        metavar="MULTIPLE",
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
        "Type of the products' operands; tf32 on a GPU only. Weights stay float32.",
        panel=MACHINE,
    )
    screening: bool | None = setting(
        None,
        "Find open gates by a bfloat16 product first; the gates found are exact. "
        "Default: on CPUs with bfloat16 instructions.",
        panel=MACHINE,
        flags="--screening/--no-screening",
    )
    kernels: Literal["triton", "plain"] | None = setting(
        None,
        "Code of a GPU's steps. Default: triton where it is.",
        panel=MACHINE,
    )
    cuda_graph: bool = setting(
        False,
        "Launch each step as one CUDA graph, with triton.",
        panel=MACHINE,
        flags="--cuda-graph/--no-cuda-graph",
    )
    sparse_share: float | None = setting(
        None,
        "Share of open gates up to which a step is sparse on a GPU. Default: as measured, else 0.",
        panel=MACHINE,
        metavar="SHARE",
        ge=0,
        le=1,
    )
    device: str = setting(
        "auto", "Device: cpu, cuda, mps, or auto for the GPU if there is one.", panel=MACHINE, metavar="DEVICE"
    )
    same_hardware: bool = setting(
        False,
        "Refuse to go on with other versions or on another kind of processor. Without it the run says so and goes on.",
        panel=MACHINE,
        flags="--same-hardware",
    )
    threads: int | None = setting(
        None, "CPU threads. Default: all cores, divided by the number of ranks.", panel=MACHINE, metavar="THREADS", ge=1
    )
    stack: int | None = setting(
        None,
        "Largest number of SAEs of one shape that are trained together. Smaller stacks give more ranks work. "
        "Default: as many as leave no rank idle and fit in memory.",
        panel=MACHINE,
        metavar="SAES",
        ge=1,
    )
    checkpoint_every: int | None = setting(
        None,
        "Steps between checkpoints beside those by time; 0 for none. Default: 0, or what the run was begun with.",
        panel=SAVING,
        metavar="STEPS",
        ge=0,
    )
    checkpoint_minutes: float = setting(
        10.0, "Most minutes between checkpoints.", panel=SAVING, metavar="MINUTES", gt=0
    )
    log_every: int = setting(50, "Steps between lines of metrics.jsonl.", panel=SAVING, metavar="STEPS", ge=1)
    eval_every: int = setting(
        500, "Steps between measurements on held-out rows; 0 for none.", panel=SAVING, metavar="STEPS", ge=0
    )
    on_divergence: Literal["stop", "retry", "continue"] | None = setting(
        None,
        "What happens to an SAE that no longer learns: stop (its last healthy weights are saved), retry (it goes back "
        "to them with a third of its rate, twice at most) or continue (it is marked). Default: stop.",
        panel=RATES,
    )
    healthy_every: int | None = setting(
        None,
        "Steps between the healthy weights that an SAE can go back to. Default: a tenth of the steps, at most 1,000.",
        ge=1,
    )
    eval_rows: int = setting(2048, "Held-out rows of such a measurement.", ge=1)
    init: str | None = setting(
        None,
        "Folder of a saved SAE, RUN/saes/NAME, to start from, for SAEs that set no init. "
        "Default: random initial weights.",
        panel=RATES,
        metavar="FOLDER",
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
        """The learning rate of an SAE: its own, the run's, or the default for its width and the number of rows."""
        default = 2e-3 * min(1.0, math.sqrt(4096 / sae.d_sae))
        return sae.lr or self.lr or (default / 4 if self.steps * self.batch_size >= LONG_RUN_ROWS else default)

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

    def resolved(
        self, *, device: str, threads: int, ranks: int = 1, screening: bool = False,
        kernels: Literal["triton", "plain"] | None = None, sparse_share: float | None = None,
    ) -> "ResolvedRun":  # fmt: skip
        """The same run with every default filled in; the arguments are used where the settings leave it open.

        ranks: number of processes that share the groups; stacks are cut so that each finds one.
        """
        decay, warm_up, rise = self.lr_decay_steps, self.l1_warm_up_steps, self.lr_warm_up_steps
        clipped, saes = self.row_clip is not False, self.named_saes()
        gaps = [b - a for a, b in itertools.pairwise((0, *self.resample_at))]
        silent = self.batch_size * (min(gaps) // 2) if gaps else None
        filled_in = {
            "l1_warm_up_steps": -(-self.steps // 10) if warm_up is None else warm_up,
            "lr_warm_up_steps": min(1000, -(-self.steps // 10)) if rise is None else rise,
            "lr_decay_steps": self.steps // 5 if decay is None else decay,
            "adam_eps": self.adam_eps or (6e-10 if clipped else 1e-8),
            "row_clip": clipped,
            "encoder_start": self.encoder_start or "scaled",
            "on_divergence": self.on_divergence or "stop",
            "healthy_every": self.healthy_every or min(1000, -(-self.steps // 10)),
            "resample_silent_rows": self.resample_silent_rows or silent,
            "resample_norm_multiple": 3.0 if self.resample_norm_multiple is None else self.resample_norm_multiple,
            "device": device if self.device == "auto" else self.device,
            "threads": self.threads or threads,
            "stack": self.stack or _stack_for(saes, ranks),
            "checkpoint_every": self.checkpoint_every or 0,
            "screening": screening if self.screening is None else self.screening,
            "kernels": self.kernels or kernels,
            "sparse_share": sparse_share if self.sparse_share is None else self.sparse_share,
            "init": None,  # the SAEs have it
            "saes": saes,
        }
        return ResolvedRun(**(dict(self) | filled_in))


class ResolvedRun(RunConfig):
    """A run whose defaults are filled in: what is trained, and what `RUN/config.toml` records."""

    lr_warm_up_steps: int
    l1_warm_up_steps: int
    lr_decay_steps: int
    adam_eps: float
    row_clip: bool
    encoder_start: Literal["scaled", "unit"]
    on_divergence: Literal["stop", "retry", "continue"]
    healthy_every: int
    resample_norm_multiple: float
    screening: bool
    threads: int
    stack: int
    checkpoint_every: int
    saes: tuple[ResolvedSAE, ...]

    @property
    def silent_rows(self) -> int:
        """Rows without a firing before a latent is resampled."""
        return self.resample_silent_rows or 2**63 - 1  # None if there are no resampling steps

    def due(self, every: int, step: int) -> bool:
        """Whether a multiple of `every` lies after the line of metrics before the one at `step`, up to it."""
        before = (step - 1) // self.log_every * self.log_every
        return step // every > before // every

    def is_checkpoint(self, step: int) -> bool:
        """Whether a checkpoint is due after a step, whatever the time since the last one."""
        return step == self.steps or (self.checkpoint_every > 0 and step % self.checkpoint_every == 0)

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
