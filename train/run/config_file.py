"""`RUN/config.toml`: the settings of a run, its stores and its SAEs, in the syntax of a sweep file."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tomli_w

from gsae.errors import UsageError

from .config import ResolvedRun, RunConfig
from .sweep import SHORT, grid

# What versions did that had no such setting.
EARLIER: dict[str, Any] = {
    "row_clip": False,
    "encoder_start": "unit",
    "resample_norm_multiple": 0.0,
    "on_divergence": "continue",
}


@dataclass(frozen=True)
class Recorded:
    """What `RUN/config.toml` says: the settings, the store's `paths` and `digest`, and the machines that trained."""

    run: ResolvedRun
    store: Mapping[str, Any]
    machines: Sequence[Mapping[str, str]]


def to_toml(recorded: Recorded) -> str:
    """The text of `RUN/config.toml`: settings, `[store]`, a `[[machine]]` table for each, and a `[[sae]]` for each SAE.

    Settings that are None are omitted. Each table is written by itself, so that short ones do not become inline tables.
    """
    config, store = recorded.run, recorded.store
    settings = _table((key, value) for key, value in config if key != "saes")
    saes = [_table((SHORT.get(key, key), value) for key, value in sae) for sae in config.saes]
    machines = [f"[[machine]]\n{_table(one.items())}" for one in recorded.machines]
    return "\n".join([settings, f"[store]\n{_table(store.items())}", *machines, *(f"[[sae]]\n{one}" for one in saes)])


def _table(values: Iterable[tuple[str, Any]]) -> str:
    return tomli_w.dumps({key: value for key, value in values if value is not None})


def from_toml(text: str) -> Recorded:
    """What `to_toml` wrote. Raises UsageError.

    Settings that an earlier version did not have get the value that stands for what it did; it noted no machine.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"config.toml cannot be read: {error}") from None
    store, saes, machines = data.pop("store", None), data.pop("sae", None), data.pop("machine", [])
    if not isinstance(store, dict) or "digest" not in store or not isinstance(saes, list):
        raise UsageError("config.toml has no [store] digest or no [[sae]] table.")
    run = RunConfig(**(EARLIER | data), saes=tuple(sae for table in saes for sae in grid(table)))
    return Recorded(run.resolved(device="cpu", threads=1), store, machines)
