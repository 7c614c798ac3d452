"""One HTML file from run folders: the Pareto plots, the figures in words, the table, where it all came from.

The page is a fixed template with its data as JSON beside it, drawn by the template's own script through
textContent, so that no name from a run folder is ever markup. Figures and sentences are settled here, where
they can be tested.
"""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gsae.errors import UsageError
from gsae.files import disk_errors, replacing
from gsae.train import RunConfig

from .pareto import SCORES, Point, Score, band, compare, non_dominated
from .runs import MAX_POINTS, Curve, Density, Evaluation, Run, read_run, thin
from .sentences import NAMES, Compared, Key, counts, headline, summary_words, tiles

MAX_BYTES = 1_000_000
COLUMNS = (
    *(
        "l0",
        "ce_loss_score",
        "ce_loss_score_mean",
        "ce_loss_score_all_positions",
        "kl_div_score",
        "explained_variance",
        "mse",
        "gamma",
        "gamma_centred",
        "cossim",
        "l2_ratio",
        "dead",
        "silent",
        "dense",
    ),
    *("architecture", "d_sae", "l1_coefficient", "lr", "seed", "site"),
)
ERRORS = ("l0", "ce_loss_score", "kl_div_score", "explained_variance", "gamma")  # whose standard errors are shown
NO_OPTIONS = ("store", "sae", "init_sha256")  # parts of config.toml that are no settings of `gsae train`
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
# An absolute path that starts a word; its last part is what may be shown.
_PATH = re.compile(r"""(?<![^\s'"=,])(?:file://)?(?:~|[A-Za-z]:)?[\\/][^\s'"]*[\\/]([^\s'"\\/]+)""")
_WHOLE = re.compile(r"(?:file://)?(?:~|[A-Za-z]:)?[\\/]")


def report(runs: Sequence[Path], out: Path) -> None:
    """Write the report of the run folders to `out`, replacing it in one step.

    The same folders give the same bytes. Raises NotFoundError for a folder that is no run or was never
    evaluated, CorruptError for a file that does not parse, UsageError where `out` is a folder or the page
    would pass 1 MB.
    """
    if not runs:
        raise UsageError("A report needs at least one run folder.")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; --out takes the report's file name, such as {out / 'report.html'}.")
    read = [read_run(folder) for folder in runs]
    command = shlex.join(["gsae", "report", *map(_shown_path, runs), "--out", _shown_path(out)])
    template = resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    for points in (MAX_POINTS, 100, 50, 20, 0):
        html = _fill(template, page(read, command, points)).encode()
        if len(html) < MAX_BYTES:
            with disk_errors(out):
                out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(out, shared=True) as temporary:
                temporary.write_bytes(html)
            return
    raise UsageError(f"A report of {sum(len(r.evaluations) for r in read)} SAEs passes 1 MB. Report fewer runs.")


def page(runs: Sequence[Run], command: str, curve_points: int = MAX_POINTS) -> dict[str, Any]:
    """Everything the page shows, as JSON values. SAEs are named by their place in `saes` from here on."""
    names = _distinct([run.name for run in runs])
    saes = [(name, e) for name, run in zip(names, runs, strict=True) for e in run.evaluations]
    evaluations = [e for _, e in saes]
    several_runs, several_sites = len(runs) > 1, len({e.site for e in evaluations}) > 1
    groups = _groups(evaluations)
    compared = {
        key: {score: compare([e.model_dump() for e in group], score) for score in SCORES}
        for key, group in groups.items()
    }
    curves = {
        i: thin(run.curves[e.sae], curve_points)
        for i, (run, e) in enumerate((run, e) for run in runs for e in run.evaluations)
        if e.sae in run.curves
    }
    return {
        "kicker": _kicker(runs, evaluations),
        "headline": headline(compared),
        "summary": summary_words(groups, compared),
        "tiles": tiles(groups, compared),
        "names": {e.architecture: NAMES.get(e.architecture, e.architecture) for e in evaluations},
        "saes": [_sae(name, e) for name, e in saes],
        "series": list(_series(saes)),
        "gaps": {score: _gap(compared, score) for score in SCORES},
        "curves": [_curve(i, curve) for i, curve in curves.items() if curve.step],
        "several": {"run": several_runs, "site": several_sites},
        "missing": list(_missing(names, runs, evaluations, bool(curves))),
        "provenance": [_provenance(name, run) for name, run in zip(names, runs, strict=True)],
        "commands": [*dict.fromkeys(c for run in runs for c in _commands(run)), command],
    }


def _sae(run: str, e: Evaluation) -> dict[str, Any]:
    """One SAE's row of the table, with its standard errors and its density histogram in shares of its latents."""
    return {
        "run": run,
        "name": e.sae,
        **{column: _short(getattr(e, column)) for column in COLUMNS},
        "errors": {key: _short(e.standard_errors.get(key), 3) for key in ERRORS},
        "density": e.density and _density(e.density, e.d_sae),
    }


def _density(density: Density, d_sae: int) -> list[list[float]]:
    """Return (middle of the bin as log10, share of the latents), from the first bin with a latent to the last."""
    full = [i for i, count in enumerate(density.latents) if count]
    edges = density.log10_edges
    inside = range(full[0], full[-1] + 1) if full else range(0)
    return [[_short((edges[i] + edges[i + 1]) / 2), _short(density.latents[i] / d_sae, 3)] for i in inside]


def _kicker(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> str:
    models = dict.fromkeys(
        str(_scrub(cfg["metadata"]["model_name"])) for run in runs for cfg in run.cfgs if _has_model(cfg)
    )
    sites = dict.fromkeys(e.site for e in evaluations)
    where = f"{', '.join(sites)} of {', '.join(models)}" if models else ", ".join(sites)
    count = len(evaluations)
    return f"{where} · {count} SAE{'' if count == 1 else 's'}"


def _has_model(cfg: Mapping[str, Any]) -> bool:
    return isinstance(cfg.get("metadata"), dict) and bool(cfg["metadata"].get("model_name"))


def _groups(evaluations: Sequence[Evaluation]) -> dict[Key, list[Evaluation]]:
    """SAEs that may be compared: one site of one store."""
    groups: dict[Key, list[Evaluation]] = {}
    for e in evaluations:
        groups.setdefault((e.site, e.store_digest), []).append(e)
    return groups


def _series(saes: Sequence[tuple[str, Evaluation]]) -> Iterator[dict[str, Any]]:
    """A line of the plots: one architecture and width of one run and site, with what is best in it at each
    score."""
    members: dict[tuple[str, str, str, int], list[int]] = {}
    for i, (run, e) in enumerate(saes):
        members.setdefault((run, e.site, e.architecture, e.d_sae), []).append(i)
    for (run, site, architecture, d_sae), inside in members.items():
        alike = [m for m in members if m[2] == architecture]
        parts = [NAMES.get(architecture, architecture)]
        if len({m[3] for m in alike}) > 1 or len({m[2] for m in members}) == len(members):
            parts.append(f"{d_sae:,} latents")
        if len({m[1] for m in members}) > 1:
            parts.append(site)
        if sum(m[1:] == (site, architecture, d_sae) for m in alike) > 1:
            parts.append(run)
        l0 = np.array([_nan(saes[i][1].l0) for i in inside])
        fronts, bands = {}, {}
        for score in SCORES:
            values = np.array([_nan(getattr(saes[i][1], score)) for i in inside])
            fronts[score] = [inside[k] for k in non_dominated(l0, values)]
            bands[score] = [[_short(v) for v in at] for at in band(_by_seed([saes[i][1] for i in inside], score))]
        yield {
            "label": ", ".join(parts),
            "architecture": architecture,
            "saes": inside,
            "fronts": fronts,
            "bands": bands,
        }


def _by_seed(evaluations: Sequence[Evaluation], score: Score) -> list[list[Point]]:
    """One curve a seed."""
    curves: dict[int | None, list[Point]] = {}
    for e in evaluations:
        curves.setdefault(e.seed, []).append(Point(_nan(e.l0), _nan(getattr(e, score))))
    return list(curves.values())


def _gap(compared: Compared, score: Score) -> dict[str, float] | None:
    """Where to draw the ratio between the two curves; with several sites there is no one place."""
    gaps = [c[score].ratio for c in compared.values()]
    if len(gaps) != 1 or gaps[0].gap is None or gaps[0].value is None:
        return None
    gap = gaps[0].gap
    return {"score": gap.score, "gated": gap.gated_l0, "baseline": gap.baseline_l0, "ratio": gaps[0].value}


def _curve(sae: int, curve: Curve) -> dict[str, Any]:
    return {
        "sae": sae,
        "step": curve.step,
        **{name: [_short(v, 4) for v in column] for name, column in curve.values.items()},
    }


def _missing(
    names: Sequence[str], runs: Sequence[Run], evaluations: Sequence[Evaluation], curves: bool
) -> Iterator[str]:
    without = [e.sae for e in evaluations if e.ce_loss_score is None]
    if without:
        which = "" if len(without) == len(evaluations) else f" for {', '.join(without)}"
        yield (
            f"Loss recovered is missing{which}: it needs the language model. "
            "`gsae eval RUN` with the model at hand adds it."
        )
    if len({e.store_digest for e in evaluations}) > 1:
        yield "The runs were trained from different stores: so they were not measured on the same rows."
    for name, run in zip(names, runs, strict=True):
        if run.missing:
            yield f"Not evaluated in {name}: {', '.join(run.missing)}. `gsae eval` adds them."
    if not curves:
        yield "There are no training curves: metrics.jsonl is absent or empty."


def _provenance(name: str, run: Run) -> dict[str, Any]:
    """Facts that all SAEs of a run share, the well-known ones first, and the run's settings."""
    metadata = [_metadata(cfg) for cfg in run.cfgs]
    shared = {k: v for k, v in metadata[0].items() if all(m.get(k) == v for m in metadata)} if metadata else {}
    shared.setdefault("store_digest", _only(e.store_digest for e in run.evaluations))
    shared.setdefault("site", _only(e.site for e in run.evaluations))
    facts = [[label, _text(shared[key])] for key, label in FACTS.items() if shared.get(key) not in (None, "")]
    facts.append(["Held-out rows", counts(sorted({e.rows for e in run.evaluations}))])
    return {"run": name, "facts": facts, "settings": [[k, _text(v)] for k, v in _flat(run.config)]}


def _metadata(cfg: Mapping[str, Any]) -> dict[str, Any]:
    outer = cfg.get("metadata")
    outer = outer if isinstance(outer, dict) else {}
    ours = outer.get("gsae")
    ours = ours if isinstance(ours, dict) else {}
    return {"d_in": cfg.get("d_in"), **outer, **ours}


def _only(values: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _commands(run: Run) -> Iterator[str]:
    """The commands that trained and evaluated a run, from its config.toml; paths are cut to their last parts."""
    config, store = run.config, run.config.get("store")
    saes, where = config.get("sae"), store.get("paths") if isinstance(store, dict) else None
    if not isinstance(saes, list) or not isinstance(where, list):
        return
    words = ["gsae", "train", *(str(_scrub(path)) for path in where)]
    for key, value in config.items():
        option = f"--{key.replace('_', '-')}"
        if key not in NO_OPTIONS and value not in ([], False) and value != _default(key):
            words += [option] if value is True else [option, _word(value)]
    for sae in saes:
        keys = ("arch", *sorted({*sae} - {"arch", *NO_OPTIONS}))
        arch, *rest = (sae[key] if key == "arch" else f"{key}={_word(sae[key])}" for key in keys)
        words += ["--sae", " ".join(map(str, (arch, *rest)))]
    yield shlex.join([*words, "--out", run.name])
    model = any(e.ce_loss_score is not None for e in run.evaluations)
    yield shlex.join(["gsae", "eval", run.name, *([] if model else ["--no-model"])])


def _default(setting: str) -> Any:
    """What a training takes where a setting is not given; one that it works out itself has None."""
    field = RunConfig.model_fields.get(setting)
    return list(field.default) if field and isinstance(field.default, tuple) else field and field.default


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(_scrub(value))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings as (dotted name, value); a list of tables, such as the SAEs, gives one entry a table."""
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
        return str(_scrub(value))
    return json.dumps(_scrub(value), ensure_ascii=False, default=str)


def _scrub(value: Any) -> Any:
    """`value` with every absolute path cut to its last part: a report is shown to others."""
    if isinstance(value, str):
        whole = _WHOLE.match(value) and re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        return whole or _PATH.sub(r"\1", value)
    if isinstance(value, list):
        return [_scrub(v) for v in value]
    if isinstance(value, dict):
        return {k: _scrub(v) for k, v in value.items()}
    return value


def _shown_path(path: Path) -> str:
    return path.name if path.is_absolute() or ".." in path.parts else str(path)


def _distinct(names: Sequence[str]) -> list[str]:
    return [name if name not in names[:i] else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _short(value: Any, digits: int = 6) -> Any:
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def _fill(template: str, data: Mapping[str, Any]) -> str:
    """The template with its policy and data. Only the script and style that stand in the template may act."""
    script, style = (_digest(template, tag) for tag in ("script", "style"))
    policy = f"default-src 'none'; script-src '{script}'; style-src '{style}'; base-uri 'none'; form-action 'none'"
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":  # U+2028 and 2029 are escaped already: the JSON is ASCII
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    before, after = template.replace("{{policy}}", policy).split("{{data}}")
    return before + text + after


def _digest(template: str, tag: str) -> str:
    (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, flags=re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
