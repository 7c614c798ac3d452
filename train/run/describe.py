"""What a run is and how far it has come, as one JSON-ready value: its settings, its SAEs and their last metrics."""

from pathlib import Path
from typing import Any

from gsae.errors import NotFoundError

from .config_file import from_toml
from .folder import CONFIG, read_config
from .metrics_files import last_lines


def describe_run(run: Path) -> dict[str, Any]:
    """Describe the run in folder `run`. Raises NotFoundError if there is none."""
    config = read_config(run)
    last = last_lines(run, config)
    names = [sae.name for sae in config.saes]
    saved = {path.parent.name for path in run.glob("saes/*/cfg.json")}
    complete = all(name in saved or (name in last and last[name].stopped is not None) for name in names)
    settings = config.model_dump(mode="json", exclude={"saes", "init"})
    return {
        "state": "complete" if complete else "unfinished",
        "step": min((last[name].step if name in last else 0 for name in names), default=0),
        **settings,
        "saes": [{"sae": name, **(last[name].noted() if name in last else {})} for name in names],
    }


def stores_of(run: Path) -> list[str]:
    """The places of the stores that a run was trained from. Raises NotFoundError if a local one no longer exists."""
    read_config(run)
    stores = [str(path) for path in from_toml((run / CONFIG).read_text()).store.get("paths", [])]
    for store in stores:
        if "://" not in store and not Path(store).is_dir():
            raise NotFoundError(f"{run} was trained from {store}, which does not exist. Give its place with --store.")
    return stores
