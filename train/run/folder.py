"""The run's folder: the settings it was begun with, and for each group who holds it and how far it is.

The first process to come writes `config.toml`; every later one must ask for the same. A group's files are in
`state/<number>/`: a lock that lives as long as the process that holds it, its checkpoint, and its lines of metrics.
`metrics.jsonl` is made from those, in order of steps, after every checkpoint and at the end, so that its bytes do not
depend on who trained what.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gsae.errors import CorruptError, IncompatibleError, NotFoundError, UsageError
from gsae.files import claim, held, remove_temporary, replace_text
from gsae.store import Site
from gsae.train.sae import CFG, weights_sha256
from gsae.train.step.bank import screening_pays

from .checkpoint import load_checkpoint
from .config import RunConfig, SAEConfig
from .config_file import from_toml, to_toml
from .process import device_of
from .ranks import Ranks

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
LOCK = "lock"
# Settings that change nothing in the result and may differ on a resume; the SAEs have the learning rates.
FREE = ("checkpoint_every", "checkpoint_minutes", "lr")


def settled(run: Path, config: RunConfig, site: Site, ranks: Ranks) -> RunConfig:
    """The run's settings with all defaults resolved, as `config.toml` has or, at the first start, gets them.

    Raises IncompatibleError, naming what differs, for other settings, another store, or a folder that is no run's.
    """
    if (run / CONFIG).exists():
        return _same(run, config, site)
    try:
        run.mkdir(parents=True, exist_ok=True)
        begun = [entry.name for entry in run.iterdir() if entry.name not in (f".{CONFIG}.tmp", CONFIG, ".lock")]
    except (FileExistsError, NotADirectoryError):
        raise IncompatibleError(f"{run} is a file; a run needs a folder of its own.") from None
    if begun:
        raise IncompatibleError(f"{run} is not empty and no run of gsae (it has {begun[0]}); choose another.")
    with held(run / ".lock"):  # of several processes that begin, one decides for all
        if not (run / CONFIG).exists():
            new = _new(config, ranks)
            text = to_toml(new, {"paths": site.store.locations, "digest": site.store.digest})
            replace_text(run / CONFIG, text)
    return _same(run, config, site)


def _new(config: RunConfig, ranks: Ranks) -> RunConfig:
    hashed = [s.model_copy(update={"init_sha256": weights_sha256(s.init)}) if s.init else s for s in config.saes]
    device = device_of(config)
    new = config.model_copy(update={"saes": tuple(hashed)})
    screening = screening_pays()
    return new.resolved(device=device, threads=ranks.threads, ranks=ranks.world_size, screening=screening)


def _same(run: Path, config: RunConfig, site: Site) -> RunConfig:
    recorded, digest = _recorded(run / CONFIG)
    if digest != site.store.digest:
        raise IncompatibleError(
            f"{run} was trained on a store with digest {digest[:12]}; this one has {site.store.digest[:12]}."
        )
    asked = config.resolved(device=recorded.device, threads=recorded.threads or 1)
    if config.stack is None:
        asked = asked.model_copy(update={"stack": recorded.stack})
    if config.screening is None:
        asked = asked.model_copy(update={"screening": recorded.screening})
    difference = _difference(recorded, asked)
    if difference:
        raise IncompatibleError(f"{run} was begun with other settings: {difference}. Choose another folder.")
    return asked.model_copy(update={"saes": recorded.saes})


def _difference(recorded: RunConfig, asked: RunConfig) -> str | None:
    for field in RunConfig.model_fields:
        was, now = getattr(recorded, field), getattr(asked, field)
        if field == "saes":
            return _sae_difference(recorded.saes, asked.saes)
        if was != now and field not in FREE:
            return f"{field} was {was}, now {now}"
    return None


def _sae_difference(recorded: tuple[SAEConfig, ...], asked: tuple[SAEConfig, ...]) -> str | None:
    if len(recorded) != len(asked):
        return f"it has {len(recorded)} SAEs, now {len(asked)}"
    for was, now in zip(recorded, asked, strict=True):
        if was.name != now.name:
            return f"the SAE {was.name} stands where {now.name} is asked for now"
        for field in SAEConfig.model_fields:
            old, new = getattr(was, field), getattr(now, field)
            if old != new and field != "init_sha256":
                return f"{field} of {was.name} was {old}, now {new}"
    return None


def read_config(run: str | Path) -> RunConfig:
    """The settings of a run. Raises NotFoundError where there is none, IncompatibleError where it is not ours."""
    path = Path(run) / CONFIG
    if not path.exists():
        raise NotFoundError(f"There is no run in {run}: {CONFIG} is missing.")
    return _recorded(path)[0]


def _recorded(path: Path) -> tuple[RunConfig, str]:
    try:
        config, store = from_toml(path.read_text())
    except (UsageError, UnicodeDecodeError) as error:
        raise IncompatibleError(f"{path} is not that of a run of gsae: {error}") from None
    return config, store["digest"]


# -- groups


@dataclass(frozen=True)
class Claim:
    """A group that this process holds, its number and its folder, until `release`."""

    number: int
    folder: Path
    lock: BinaryIO

    def release(self) -> None:
        """Let others have it."""
        self.lock.close()


def group_folder(run: Path, number: int) -> Path:
    """Where a group keeps its files."""
    return run / "state" / str(number)


def claimed(run: Path, number: int) -> Claim | None:
    """Take a group, unless a process that lives has it."""
    folder = group_folder(run, number)
    lock = claim(folder / LOCK)
    if lock is None:
        return None
    remove_temporary(folder)
    return Claim(number, folder, lock)


def is_finished(run: Path, config: RunConfig, number: int) -> bool:
    """Whether a group is at its last step with all its SAEs saved."""
    state = load_checkpoint(group_folder(run, number), only=("stopped",))
    if state is None or state.step < config.steps or "stopped" not in state.tensors:
        return False
    stopped = state.tensors["stopped"].tolist()
    wanted = [str(sae.name) for sae, at in zip(config.groups()[number], stopped, strict=True) if at < 0]
    return all((run / "saes" / name / CFG).exists() for name in wanted)


# -- metrics


def keep_metrics(folder: Path, size: int) -> None:
    """Cut a group's metrics to what they were at its checkpoint; CorruptError where there are fewer."""
    path = folder / METRICS
    path.touch()
    if path.stat().st_size < size:
        raise CorruptError(f"{path} has {path.stat().st_size} bytes; the checkpoint needs {size}.")
    os.truncate(path, size)


def group_lines(run: Path, number: int) -> list[tuple[int, str]]:
    """A group's lines of metrics with the step of each, without one that is still being written."""
    found = []
    with suppress(FileNotFoundError):
        for line in (group_folder(run, number) / METRICS).read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                found.append((int(json.loads(line)["step"]), line))
    return found


def merge_metrics(run: Path, config: RunConfig) -> None:
    """Make `metrics.jsonl` from all groups' lines, by step, then in the order of the run's SAEs."""
    place = {str(sae.name): index for index, sae in enumerate(config.named_saes())}
    with held(run / ".lock"):  # the last to merge has seen what every other wrote
        lines: list[tuple[int, int, str]] = []
        for number in range(len(config.groups())):
            lines += [(step, place[json.loads(line)["sae"]], line) for step, line in group_lines(run, number)]
        text = "".join(line for _, _, line in sorted(lines))
        path = run / METRICS
        if not path.exists() or path.read_text() != text:
            replace_text(path, text)


def last_lines(run: Path, config: RunConfig) -> dict[str, dict[str, Any]]:
    """The newest line of metrics of every SAE that has one."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(len(config.groups())):
        for _, line in group_lines(run, number):
            figures = json.loads(line)
            found[figures["sae"]] = figures
    return found
