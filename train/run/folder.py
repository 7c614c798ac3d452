"""The folder of a run: the settings that it was started with, and which process holds which group.

The first process writes `config.toml`; every later one must ask for the same settings. A group has its files in
`state/<number>/`: a lock that is held as long as the process that trains it lives, its checkpoint and its metrics.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch

from gsae.errors import IncompatibleError, NotFoundError, UsageError
from gsae.files import claim, held, remove_temporary, replace_text
from gsae.store import Site
from gsae.train.sae import CFG, weights_sha256

from .checkpoint import load_checkpoint
from .computing import resolved_here
from .config import ResolvedRun, ResolvedSAE, RunConfig
from .config_file import Recorded, from_toml, to_toml
from .events import Listener, Moved
from .fitting import fitted
from .machine import changes, machine_for
from .metrics_files import group_folder
from .ranks import Ranks

CONFIG = "config.toml"
LOCK = "lock"
# Settings that do not change the result and may differ on a resume. The SAEs record their learning rates.
FREE = ("checkpoint_every", "checkpoint_minutes", "lr", "same_hardware")
# Settings that a run decides at its first start where they are left open. It keeps to them, whatever version goes on.
DECIDED = (
    "adam_eps", "checkpoint_every", "encoder_start", "healthy_every", "kernels", "l1_warm_up_steps",
    "lr_decay_steps", "lr_warm_up_steps", "on_divergence", "resample_norm_multiple", "resample_silent_rows",
    "row_clip", "screening", "sparse_share", "stack",
)  # fmt: skip


def begin_or_resume(run: Path, config: RunConfig, site: Site, ranks: Ranks, listen: Listener) -> ResolvedRun:
    """Write `config.toml` at the first start; return the settings, resolved as recorded there.

    Notes this machine in it, and reports one that differs from the last. Raises IncompatibleError, naming the
    difference, for other settings, another store, a folder that is not a run, or another machine if `same_hardware`;
    SpaceError for a new run that memory is too little for.
    """
    if (run / CONFIG).exists():
        return _resumed(run, config, site, listen)
    new = _new(config, site, ranks)  # refused before the folder is made
    try:
        run.mkdir(parents=True, exist_ok=True)
        others = [entry.name for entry in run.iterdir() if entry.name not in (f".{CONFIG}.tmp", CONFIG, ".lock")]
    except (FileExistsError, NotADirectoryError):
        raise IncompatibleError(f"{run} is a file; a run needs a folder.") from None
    if others and not (run / CONFIG).exists():  # what another process has begun meanwhile is resumed
        raise IncompatibleError(f"{run} is not empty and is not a run of gsae (it has {others[0]}); choose another.")
    with held(run / ".lock"):  # of several processes that start, one decides for all
        if not (run / CONFIG).exists():
            store = {"paths": site.store.locations, "digest": site.store.digest}
            replace_text(run / CONFIG, to_toml(Recorded(new, store, [machine_for(new.device)])))
    return _resumed(run, config, site, listen)


def _new(config: RunConfig, site: Site, ranks: Ranks) -> ResolvedRun:
    """The settings of a new run, with groups that fit in memory. Raises SpaceError if the smallest do not."""
    new = fitted(site, resolved_here(config, ranks), ranks, cut=config.stack is None)
    hashed = [s.model_copy(update={"init_sha256": weights_sha256(s.init)}) if s.init else s for s in new.saes]
    return new.model_copy(update={"saes": tuple(hashed)})


def _resumed(run: Path, config: RunConfig, site: Site, listen: Listener) -> ResolvedRun:
    found = _recorded(run / CONFIG)
    recorded, digest = found.run, found.store["digest"]
    if digest != site.store.digest:
        raise IncompatibleError(
            f"{run} was trained on a store with digest {digest[:12]}; this one has {site.store.digest[:12]}."
        )
    asked = _as_decided(config, recorded).resolved(device=recorded.device, threads=recorded.threads)
    difference = _difference(recorded, asked)
    if difference:
        raise IncompatibleError(f"{run} was started with other settings: {difference}. Choose another folder.")
    if not all(is_finished(run, recorded, number) for number in range(len(recorded.groups()))):
        _note_machine(run, asked, listen)
    return asked.model_copy(update={"saes": recorded.saes})


def _note_machine(run: Path, asked: ResolvedRun, listen: Listener) -> None:
    """Add this machine to those of the run if it is another than the last."""
    now = machine_for(asked.device)
    with held(run / ".lock"):
        found = _recorded(run / CONFIG)
        changed = changes(found.machines, now)
        if changed and asked.same_hardware:
            raise IncompatibleError(f"{run} was trained elsewhere: {changed}. Without --same-hardware it goes on.")
        if changed or not found.machines:
            replace_text(run / CONFIG, to_toml(replace(found, machines=[*found.machines, now])))
    if changed:
        listen(Moved(changed))


def _as_decided(config: RunConfig, recorded: ResolvedRun) -> RunConfig:
    """The settings with those that are left open as the run decided them."""
    left_open = {name: getattr(recorded, name) for name in DECIDED if getattr(config, name) is None}
    saes = config.saes
    if config.lr is None and len(saes) == len(recorded.saes):
        pairs = zip(saes, recorded.saes, strict=True)
        saes = tuple(sae.model_copy(update={"lr": sae.lr or was.lr}) for sae, was in pairs)
    return config.model_copy(update=left_open | {"saes": saes})


def _difference(recorded: ResolvedRun, asked: ResolvedRun) -> str | None:
    for field in RunConfig.model_fields:
        was, now = getattr(recorded, field), getattr(asked, field)
        if field == "saes":
            return _sae_difference(recorded.saes, asked.saes)
        if was != now and field not in FREE:
            return f"{field} was {was}, now {now}"
    return None


def _sae_difference(recorded: tuple[ResolvedSAE, ...], asked: tuple[ResolvedSAE, ...]) -> str | None:
    if len(recorded) != len(asked):
        return f"it has {len(recorded)} SAEs, now {len(asked)}"
    for was, now in zip(recorded, asked, strict=True):
        if was.name != now.name:
            return f"it has the SAE {was.name} in the place of {now.name}"
        for field in ResolvedSAE.model_fields:
            old, new = getattr(was, field), getattr(now, field)
            if old != new and field != "init_sha256":
                return f"{field} of {was.name} was {old}, now {new}"
    return None


def read_config(run: str | Path) -> ResolvedRun:
    """The settings of a run. Raises NotFoundError if there is none, IncompatibleError if its settings are not ours."""
    path = Path(run) / CONFIG
    if not path.exists():
        raise NotFoundError(f"There is no run in {run}: {CONFIG} is missing.")
    return _recorded(path).run


def _recorded(path: Path) -> Recorded:
    try:
        return from_toml(path.read_text())
    except (UsageError, UnicodeDecodeError) as error:
        raise IncompatibleError(f"{path} is not that of a run of gsae: {error}") from None


# -- groups


@dataclass(frozen=True)
class Claim:
    """A group that this process holds until `release`: its number and its folder."""

    number: int
    folder: Path
    lock: BinaryIO

    def release(self) -> None:
        """Let other processes take it."""
        self.lock.close()


def claim_group(run: Path, number: int) -> Claim | None:
    """Take a group, unless a living process holds it."""
    folder = group_folder(run, number)
    lock = claim(folder / LOCK)
    if lock is None:
        return None
    remove_temporary(folder)
    return Claim(number, folder, lock)


def is_finished(run: Path, config: ResolvedRun, number: int) -> bool:
    """Whether a group is at its last step with all its SAEs saved."""
    state = load_checkpoint(group_folder(run, number), only=("stopped", "divergence.healthy_at"))
    if state is None or state.step < config.steps or "stopped" not in state.tensors:
        return False
    stopped = state.tensors["stopped"]
    saved = (stopped < 0) | (state.tensors.get("divergence.healthy_at", torch.zeros_like(stopped)) > 0)
    wanted = [sae.name for sae, one in zip(config.groups()[number], saved.tolist(), strict=True) if one]
    return all((run / "saes" / name / CFG).exists() for name in wanted)
