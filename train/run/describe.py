"""What a run is and how far it came, as one JSON-ready value: its settings, its SAEs and their last figures."""

from pathlib import Path
from typing import Any

from gsae.errors import NotFoundError

from .config_file import from_toml
from .folder import CONFIG, last_lines, read_config


def describe_run(run: Path) -> dict[str, Any]:
    """Describe the run in folder `run`; raises NotFoundError where there is none."""
    config = read_config(run)
    last = last_lines(run, config)
    names = [str(sae.name) for sae in config.named_saes()]
    step = min((last.get(name, {}).get("step", 0) for name in names), default=0)
    saved = {path.parent.name for path in run.glob("saes/*/cfg.json")}
    settings = config.model_dump(mode="json", exclude={"saes", "init"})
    return {
        "state": "complete" if all(n in saved or "stopped" in last.get(n, {}) for n in names) else "unfinished",
        "step": step,
        **settings,
        "saes": [{"sae": name, **last.get(name, {})} for name in names],
    }


def stores_of(run: Path) -> list[str]:
    """Return where the stores were that a run was trained from; raises NotFoundError when one is there no more."""
    read_config(run)
    stores = [str(path) for path in from_toml((run / CONFIG).read_text())[1].get("paths", [])]
    for store in stores:
        if "://" not in store and not Path(store).is_dir():
            raise NotFoundError(f"{run} was trained from {store}, which is not there. Say where it is with --store.")
    return stores
