"""The folder of a run: the settings that it was started with, and which process holds which group.

The first process writes `config.toml`; every later one must ask for the same settings. A group has its files in
`state/<number>/`: a lock that is held as long as the process that trains it lives, its checkpoint and its metrics.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gsae.errors import IncompatibleError, NotFoundError, UsageError
from gsae.files import claim, held, remove_temporary, replace_text
from gsae.store import Site
from gsae.train.sae import CFG, weights_sha256
from gsae.train.step.screening import screening_pays

from .checkpoint import load_checkpoint
from .computing import device_of
from .config import ResolvedRun, ResolvedSAE, RunConfig
from .config_file import from_toml, to_toml
from .metrics_files import group_folder
from .ranks import Ranks

CONFIG = "config.toml"
LOCK = "lock"
# Settings that do not change the result and may differ on a resume. The SAEs record their learning rates.
FREE = ("checkpoint_every", "checkpoint_minutes", "lr")


def begin_or_resume(run: Path, config: RunConfig, site: Site, ranks: Ranks) -> ResolvedRun:
    """Write `config.toml` at the first start; return the settings, resolved as recorded there.

    Raises IncompatibleError, naming the difference, for other settings, another store, or a folder that is not a run.
    """
    if (run / CONFIG).exists():
        return _resumed(run, config, site)
    try:
        run.mkdir(parents=True, exist_ok=True)
        others = [entry.name for entry in run.iterdir() if entry.name not in (f".{CONFIG}.tmp", CONFIG, ".lock")]
    except (FileExistsError, NotADirectoryError):
        raise IncompatibleError(f"{run} is a file; a run needs a folder.") from None
    if others:
        raise IncompatibleError(f"{run} is not empty and is not a run of gsae (it has {others[0]}); choose another.")
    with held(run / ".lock"):  # of several processes that start, one decides for all
        if not (run / CONFIG).exists():
            new = _new(config, ranks)
            text = to_toml(new, {"paths": site.store.locations, "digest": site.store.digest})
            replace_text(run / CONFIG, text)
    return _resumed(run, config, site)


def _new(config: RunConfig, ranks: Ranks) -> ResolvedRun:
    new = config.resolved(
        device=device_of(config), threads=ranks.threads, ranks=ranks.world_size, screening=screening_pays()
    )
    hashed = [s.model_copy(update={"init_sha256": weights_sha256(s.init)}) if s.init else s for s in new.saes]
    return new.model_copy(update={"saes": tuple(hashed)})


def _resumed(run: Path, config: RunConfig, site: Site) -> ResolvedRun:
    recorded, digest = _recorded(run / CONFIG)
    if digest != site.store.digest:
        raise IncompatibleError(
            f"{run} was trained on a store with digest {digest[:12]}; this one has {site.store.digest[:12]}."
        )
    asked = config.resolved(device=recorded.device, threads=recorded.threads)
    if config.stack is None:
        asked = asked.model_copy(update={"stack": recorded.stack})
    if config.screening is None:
        asked = asked.model_copy(update={"screening": recorded.screening})
    difference = _difference(recorded, asked)
    if difference:
        raise IncompatibleError(f"{run} was started with other settings: {difference}. Choose another folder.")
    return asked.model_copy(update={"saes": recorded.saes})


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
    return _recorded(path)[0]


def _recorded(path: Path) -> tuple[ResolvedRun, str]:
    try:
        config, store = from_toml(path.read_text())
    except (UsageError, UnicodeDecodeError) as error:
        raise IncompatibleError(f"{path} is not that of a run of gsae: {error}") from None
    return config, store["digest"]


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
    state = load_checkpoint(group_folder(run, number), only=("stopped",))
    if state is None or state.step < config.steps or "stopped" not in state.tensors:
        return False
    stopped = state.tensors["stopped"].tolist()
    wanted = [sae.name for sae, at in zip(config.groups()[number], stopped, strict=True) if at < 0]
    return all((run / "saes" / name / CFG).exists() for name in wanted)
