"""A short run of four SAEs in three shapes on the small store, and what it reports."""

from pathlib import Path
from typing import Any

from gsae.store import Store
from gsae.train import Event, RunConfig, parse_sae, train

SAES = parse_sae("gated width=48 l1=.1,.3") + parse_sae("relu width=40 l1=.1") + parse_sae("gated width=16 l1=.2")


def config(**settings: Any) -> RunConfig:
    """Its settings, some of them changed."""
    usual = {"site": "mlp.1", "steps": 30, "batch_size": 96, "log_every": 7, "threads": 1, "saes": SAES}
    return RunConfig(**(usual | settings))


def run(store: Store, out: Path, **settings: Any) -> list[Event]:
    """Train it to its end, or go on with it."""
    events: list[Event] = []
    train(store.site("mlp.1"), config(**settings), out, events.append)
    return events
