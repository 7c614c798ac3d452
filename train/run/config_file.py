"""`RUN/config.toml`: the settings of a run, its stores and its SAEs, in the syntax of a sweep file."""

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

import tomli_w

from gsae.errors import UsageError

from .config import ResolvedRun, RunConfig
from .sweep import SHORT, grid


def to_toml(config: ResolvedRun, store: Mapping[str, Any]) -> str:
    """The text of `RUN/config.toml`: settings, a `[store]` table (paths, digest) and a `[[sae]]` table for each SAE.

    Settings that are None are omitted. Each table is written by itself, so that short ones do not become inline tables.
    """
    settings = _table((key, value) for key, value in config if key != "saes")
    saes = [_table((SHORT.get(key, key), value) for key, value in sae) for sae in config.saes]
    return "\n".join([settings, f"[store]\n{_table(store.items())}", *(f"[[sae]]\n{table}" for table in saes)])


def _table(values: Iterable[tuple[str, Any]]) -> str:
    return tomli_w.dumps({key: value for key, value in values if value is not None})


def from_toml(text: str) -> tuple[ResolvedRun, dict[str, Any]]:
    """The settings and the `[store]` table that `to_toml` wrote. Raises UsageError.

    Settings that an earlier version did not have get the value that stands for its behaviour.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"config.toml cannot be read: {error}") from None
    store, saes = data.pop("store", None), data.pop("sae", None)
    if not isinstance(store, dict) or "digest" not in store or not isinstance(saes, list):
        raise UsageError("config.toml has no [store] digest or no [[sae]] table.")
    run = RunConfig(**data, saes=tuple(sae for table in saes for sae in grid(table)))
    return run.resolved(device="cpu", threads=1), store
