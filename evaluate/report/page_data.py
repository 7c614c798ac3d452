"""Everything that the report's page shows, as plain values: what its script draws and the PNG plots are drawn from.

SAEs are named by their index in `Page.saes`, so that no name from a run folder is used as a key.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gsae.evaluate.eval_json import Density, Evaluation

from .comparison import compare
from .curves import MAX_POINTS, Curve, thin
from .pareto import SCORES, Point, Score, band, non_dominated
from .provenance import commands, provenance
from .runs import Run
from .sentences import NAMES, Compared, Key, headline, kicker, missing, summary_paragraphs, tiles
from .shown_metrics import ERRORS, METRICS

SETTINGS = ("architecture", "d_sae", "l1_coefficient", "lr", "seed", "site")


@dataclass(frozen=True)
class Series:
    """A line of the plots: the SAEs of one architecture and width, of one run and site.

    saes: their indices. fronts: for each score the indices of its Pareto front, by L0. bands: for each score the spread
    over seeds as [L0, lowest, highest].
    """

    label: str
    architecture: str
    saes: list[int]
    fronts: dict[str, list[int]]
    bands: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Page:
    """The page's data, with the names and the order that its JSON has."""

    kicker: str
    headline: str
    summary: list[str]
    tiles: list[dict[str, str]]
    names: dict[str, str]
    saes: list[dict[str, Any]]
    series: list[Series]
    gaps: dict[str, dict[str, float] | None]
    curves: list[dict[str, Any]]
    several: dict[str, bool]
    missing: list[str]
    provenance: list[dict[str, Any]]
    commands: list[str]


def make_page(runs: Sequence[Run], command: str, curve_points: int = MAX_POINTS) -> Page:
    """Return the page of some runs. command: the one that makes it. curve_points: of a training curve, at most."""
    names = _distinct([run.name for run in runs])
    saes = [(name, e) for name, run in zip(names, runs, strict=True) for e in run.evaluations]
    evaluations = [e for _, e in saes]
    groups = _comparable(evaluations)
    compared = {key: {score: compare(group, score) for score in SCORES} for key, group in groups.items()}
    curves = {
        i: thin(run.curves[e.sae], curve_points)
        for i, (run, e) in enumerate((run, e) for run in runs for e in run.evaluations)
        if e.sae in run.curves
    }
    return Page(
        kicker=kicker(runs, evaluations),
        headline=headline(compared),
        summary=summary_paragraphs(groups, compared),
        tiles=tiles(groups, compared),
        names={e.architecture: NAMES.get(e.architecture, e.architecture) for e in evaluations},
        saes=[_sae(name, e) for name, e in saes],
        series=list(_series(saes)),
        gaps={score: _gap(compared, score) for score in SCORES},
        curves=[_curve(i, curve) for i, curve in curves.items() if curve.step],
        several={"run": len(runs) > 1, "site": len({e.site for e in evaluations}) > 1},
        missing=list(missing(names, runs, evaluations, has_curves=bool(curves))),
        provenance=[provenance(name, run) for name, run in zip(names, runs, strict=True)],
        commands=[*dict.fromkeys(c for run in runs for c in commands(run)), command],
    )


def _comparable(evaluations: Sequence[Evaluation]) -> dict[Key, list[Evaluation]]:
    """Group SAEs that may be compared: those of one site of one store."""
    groups: dict[Key, list[Evaluation]] = {}
    for e in evaluations:
        groups.setdefault((e.site, e.store_digest), []).append(e)
    return groups


def _sae(run: str, e: Evaluation) -> dict[str, Any]:
    """Return one SAE's row of the table, with its standard errors and its density histogram."""
    return {
        "run": run,
        "name": e.sae,
        **{metric.key: _short(getattr(e, metric.key)) for metric in METRICS},
        **{setting: _short(getattr(e, setting)) for setting in SETTINGS},
        "errors": {key: _short(e.standard_errors.get(key), 3) for key in ERRORS},
        "density": e.density and _density(e.density, e.d_sae),
    }


def _density(density: Density, d_sae: int) -> list[list[float]]:
    """Return [middle of the bin as log10, share of the latents] from the first bin with a latent to the last."""
    full = [i for i, count in enumerate(density.latents) if count]
    edges = density.log10_edges
    inside = range(full[0], full[-1] + 1) if full else range(0)
    return [[_short((edges[i] + edges[i + 1]) / 2), _short(density.latents[i] / d_sae, 3)] for i in inside]


def _series(saes: Sequence[tuple[str, Evaluation]]) -> Iterator[Series]:
    members: dict[tuple[str, str, str, int], list[int]] = {}
    for i, (run, e) in enumerate(saes):
        members.setdefault((run, e.site, e.architecture, e.d_sae), []).append(i)
    for key, inside in members.items():
        evaluations = [saes[i][1] for i in inside]
        l0 = np.array([_nan(e.l0) for e in evaluations])
        fronts, bands = {}, {}
        for score in SCORES:
            values = np.array([_nan(getattr(e, score)) for e in evaluations])
            fronts[str(score)] = [inside[k] for k in non_dominated(l0, values)]
            bands[str(score)] = [[_short(v) for v in at] for at in band(_by_seed(evaluations, score))]
        yield Series(_label(key, list(members)), key[2], inside, fronts, bands)


def _label(key: tuple[str, str, str, int], keys: Sequence[tuple[str, str, str, int]]) -> str:
    """Return the shortest name that tells a series, (run, site, architecture, d_sae), from the others."""
    run, site, architecture, d_sae = key
    alike = [k for k in keys if k[2] == architecture]
    parts = [NAMES.get(architecture, architecture)]
    if len({k[3] for k in alike}) > 1 or len({k[2] for k in keys}) == len(keys):
        parts.append(f"{d_sae:,} latents")
    if len({k[1] for k in keys}) > 1:
        parts.append(site)
    if sum(k[1:] == key[1:] for k in alike) > 1:
        parts.append(run)
    return ", ".join(parts)


def _by_seed(evaluations: Sequence[Evaluation], score: Score) -> list[list[Point]]:
    """Return one curve for each seed."""
    curves: dict[int | None, list[Point]] = {}
    for e in evaluations:
        curves.setdefault(e.seed, []).append(Point(_nan(e.l0), _nan(getattr(e, score))))
    return list(curves.values())


def _gap(compared: Compared, score: Score) -> dict[str, float] | None:
    """Return where the ratio is drawn between the two curves; None with several sites, which have no one place."""
    ratios = [comparisons[score].ratio for comparisons in compared.values()]
    if len(ratios) != 1 or ratios[0].gap is None or ratios[0].value is None:
        return None
    gap = ratios[0].gap
    return {"score": gap.score, "gated": gap.gated_l0, "baseline": gap.baseline_l0, "ratio": ratios[0].value}


def _curve(sae: int, curve: Curve) -> dict[str, Any]:
    return {
        "sae": sae,
        "step": curve.step,
        **{name: [_short(v, 4) for v in column] for name, column in curve.values.items()},
    }


def _distinct(names: Sequence[str]) -> list[str]:
    return [name if name not in names[:i] else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _short(value: Any, digits: int = 6) -> Any:
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
