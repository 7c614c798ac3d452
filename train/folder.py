"""The run's folder: whose it is, what settings it was begun with, and the length of its metrics file.

The first call writes `config.toml`; every later one must ask for the same. A folder is held by one process at a time.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gsae.store import CorruptError, IncompatibleError, NotFoundError, Site, UsageError, all_cores

from .checkpoint import replace_file
from .config import RunConfig, from_toml, to_toml

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
FREE = ("checkpoint_every",)  # settings that change nothing in the result and may differ on a resume


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Make the folder if need be and keep other processes out of it; IncompatibleError when one is in it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    except (FileExistsError, NotADirectoryError):
        raise IncompatibleError(f"{run} is a file; a run needs a folder of its own.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IncompatibleError(f"Another process is training in {run}; wait for it or stop it.") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def settled(run: Path, config: RunConfig, site: Site) -> RunConfig:
    """The run's settings with all defaults resolved, as `config.toml` has or, at the first start, gets them.

    Raises IncompatibleError, naming what differs, for other settings, another store, or a folder that is no run's.
    """
    path = run / CONFIG
    if not path.exists():
        begun = [entry.name for entry in run.iterdir() if entry.name != f".{CONFIG}.tmp"]
        if begun:
            raise IncompatibleError(f"{run} is not empty and no run of gsae (it has {begun[0]}); choose another.")
        new = config.resolved(device="cuda" if torch.cuda.is_available() else "cpu", threads=all_cores())
        text = to_toml(new, {"paths": site.store.locations, "digest": site.store.digest})
        replace_file(path, lambda temporary: temporary.write_text(text))
        return new
    recorded, digest = _recorded(path)
    if digest != site.store.digest:
        raise IncompatibleError(
            f"{run} was trained on a store with digest {digest[:12]}; this one has {site.store.digest[:12]}."
        )
    asked = config.resolved(device=recorded.device or "cpu", threads=recorded.threads or 1)
    difference = _difference(recorded, asked)
    if difference:
        raise IncompatibleError(f"{run} was begun with other settings: {difference}. Choose another folder.")
    return asked


def read_config(run: str | Path) -> RunConfig:
    """The settings of a run. Raises NotFoundError where there is none, IncompatibleError where it is not ours."""
    path = Path(run) / CONFIG
    if not path.exists():
        raise NotFoundError(f"There is no run in {run}: {CONFIG} is missing.")
    return _recorded(path)[0]


def keep_metrics(run: Path, size: int) -> None:
    """Cut `metrics.jsonl` to what it held at the checkpoint; CorruptError where it holds less."""
    path = run / METRICS
    path.touch()
    if path.stat().st_size < size:
        raise CorruptError(f"{path} has {path.stat().st_size} bytes; the checkpoint needs {size}.")
    os.truncate(path, size)


def _recorded(path: Path) -> tuple[RunConfig, str]:
    try:
        config, store = from_toml(path.read_text())
    except (UsageError, UnicodeDecodeError) as error:
        raise IncompatibleError(f"{path} is not that of a run of gsae: {error}") from None
    return config, store["digest"]


def _difference(recorded: RunConfig, asked: RunConfig) -> str | None:
    for field in RunConfig.model_fields:
        was, now = getattr(recorded, field), getattr(asked, field)
        if field == "saes":
            return _sae_difference(recorded, asked)
        if was != now and field not in FREE:
            return f"{field} was {was}, now {now}"
    return None


def _sae_difference(recorded: RunConfig, asked: RunConfig) -> str | None:
    if len(recorded.saes) != len(asked.saes):
        return f"it has {len(recorded.saes)} SAEs, now {len(asked.saes)}"
    for was, now in zip(recorded.saes, asked.saes, strict=True):
        if was != now:
            return f"the SAE {was.name} stands where {now.name} is asked for now"
    return None
