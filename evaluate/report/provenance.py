"""Where a report's numbers come from: facts of the run, its settings, and the commands that make it again."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gsae.train import RunConfig

from .public_names import public_name, public_value
from .runs import Run
from .sentences import counts

NO_OPTIONS = ("store", "machine", "sae", "init_sha256")  # parts of config.toml that are no options of `gsae train`
FACTS = {
    "model_name": "Language model",
    "model_revision": "Model revision",
    "dataset_path": "Text",
    "dataset_revision": "Text revision",
    "site": "Site",
    "hook_name": "TransformerLens hook",
    "d_in": "Activation width",
    "context_size": "Context size",
    "store_digest": "Store digest",
    "rows": "Training rows seen",
    "steps": "Steps",
    "batch_size": "Rows a step",
    "data_seed": "Data seed",
    "scale": "Input scale",
    "max_norm_multiple": "Norm limit (× median)",
    "version": "gsae version",
}


def provenance(name: str, run: Run) -> dict[str, Any]:
    """Return what all SAEs of a run share, the well-known facts first, and the run's settings."""
    metadata = [_metadata(cfg) for cfg in run.cfgs]
    shared = {k: v for k, v in metadata[0].items() if all(m.get(k) == v for m in metadata)} if metadata else {}
    shared.setdefault("store_digest", _distinct(e.store_digest for e in run.evaluations))
    shared.setdefault("site", _distinct(e.site for e in run.evaluations))
    facts = [[label, _text(shared[key])] for key, label in FACTS.items() if shared.get(key) not in (None, "")]
    facts.append(["Held-out rows", counts(sorted({e.rows for e in run.evaluations}))])
    return {"run": name, "facts": facts, "settings": [[k, _text(v)] for k, v in _flat(run.config)]}


def commands(run: Run) -> Iterator[str]:
    """Yield the commands that trained and evaluated a run, from its config.toml; paths are cut to their last parts."""
    config, store = run.config, run.config.get("store")
    saes, where = config.get("sae"), store.get("paths") if isinstance(store, dict) else None
    if not isinstance(saes, list) or not isinstance(where, list):
        return
    words = ["gsae", "train", *(str(public_value(path)) for path in where)]
    for key, value in config.items():
        if key not in NO_OPTIONS and value != [] and value != _default(key):
            words += _option(key, value)
    for sae in saes:
        keys = ("arch", *sorted({*sae} - {"arch", *NO_OPTIONS}))
        arch, *rest = (sae[key] if key == "arch" else f"{key}={_word(sae[key])}" for key in keys)
        words += ["--sae", " ".join(map(str, (arch, *rest)))]
    yield shlex.join([*words, "--out", run.name])
    model = any(e.ce_loss_score is not None for e in run.evaluations)
    yield shlex.join(["gsae", "eval", run.name, *([] if model else ["--no-model"])])


def _metadata(cfg: Mapping[str, Any]) -> dict[str, Any]:
    outer = cfg.get("metadata")
    outer = outer if isinstance(outer, dict) else {}
    ours = outer.get("gsae")
    ours = ours if isinstance(ours, dict) else {}
    return {"d_in": cfg.get("d_in"), **outer, **ours}


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _default(setting: str) -> Any:
    """Return what training uses where a setting is not given; None where it computes the value itself."""
    field = RunConfig.model_fields.get(setting)
    return list(field.default) if field and isinstance(field.default, tuple) else field and field.default


def _option(setting: str, value: Any) -> list[str]:
    """Return the words that give a setting; none for one that only Python callers can give."""
    field = RunConfig.model_fields.get(setting)
    shown = field.json_schema_extra if field and isinstance(field.json_schema_extra, dict) else {}
    if field is not None and "panel" not in shown:
        return []
    on, _, off = str(shown.get("flags") or f"--{setting.replace('_', '-')}").partition("/")
    if isinstance(value, bool):
        return [on] if value else [off] if off else []
    return [on, _word(value)]


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_word, value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(public_value(value))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings as (dotted name, value); a list of tables, such as the SAEs, gives one entry for each table."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            for i, table in enumerate(value):
                yield f"{prefix}{key}[{i}]", ", ".join(f"{k} = {_text(v)}" for k, v in _flat(table))
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return public_name(value)
    return json.dumps(public_value(value), ensure_ascii=False, default=str)
