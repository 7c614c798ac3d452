"""The sentences of a report: its headline, a paragraph for each site, its key numbers, and what is missing.

They are made here and not in the page's script, so that what a report claims can be tested.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gsae.evaluate.eval_json import Evaluation
from gsae.evaluate.heldout_documents import few_documents

from .comparison import Comparison, documents
from .pareto import SCORES, Score
from .public_names import public_value
from .runs import Run

ARCHITECTURES = {"gated": "Gated", "relu": "Baseline"}
NAMES = ARCHITECTURES | {
    "gated-untied": "Gated, untied encoders",
    "gated-no_r_mag": "Gated without r_mag",
    "gated-unfrozen": "Gated, auxiliary decoder not frozen",
    "rescale-shift": "Baseline, rescaled and shifted",
}
SCORE_NAMES: dict[Score, str] = {
    "ce_loss_score": "loss recovered",
    "kl_div_score": "KL recovered",
    "explained_variance": "explained variance",
}

Key = tuple[str, str]  # site, store digest: SAEs that may be compared
Compared = Mapping[Key, Mapping[Score, Comparison]]


def headline(compared: Compared) -> str:
    """Return the finding in one sentence, at equal loss recovered or, without a ratio for it, the next score."""
    for score in SCORES:
        found = [c[score] for c in compared.values() if c[score].ratio.value is not None]
        if found:
            return _finding(found, SCORE_NAMES[score])
    return "Sparsity against fidelity of sparse autoencoders"


def _finding(found: Sequence[Comparison], equal: str) -> str:
    ratios = [c.ratio.value for c in found if c.ratio.value is not None]
    low, high = min(ratios), max(ratios)
    sites = f" at {len(found)} sites" if len(found) > 1 else ""
    interval = found[0].interval
    if len(found) == 1 and interval and interval.low <= 1 <= interval.high:
        return f"Gated SAEs and the baseline need about as many active latents for the same {equal}"
    if low > 1:
        times = f"{_span(low, high)}\N{NO-BREAK SPACE}times fewer active latents"
        return f"Gated SAEs reach the baseline’s {equal} with {times}{sites}"
    if high < 1:
        times = f"{_span(1 / high, 1 / low)}\N{NO-BREAK SPACE}times more active latents"
        return f"Gated SAEs need {times} for the baseline’s {equal}{sites}"
    return f"At equal {equal} the baseline needs {_span(low, high)} times the latents of Gated SAEs{sites}"


def kicker(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> str:
    """Return the line above the headline: sites, language models and the number of SAEs."""
    models = dict.fromkeys(
        str(public_value(cfg["metadata"]["model_name"])) for run in runs for cfg in run.cfgs if _has_model(cfg)
    )
    sites = dict.fromkeys(e.site for e in evaluations)
    where = f"{', '.join(sites)} of {', '.join(models)}" if models else ", ".join(sites)
    count = len(evaluations)
    return f"{where} · {count} SAE{'' if count == 1 else 's'}"


def _has_model(cfg: Mapping[str, Any]) -> bool:
    return isinstance(cfg.get("metadata"), dict) and bool(cfg["metadata"].get("model_name"))


def missing(
    names: Sequence[str], runs: Sequence[Run], evaluations: Sequence[Evaluation], *, has_curves: bool
) -> Iterator[str]:
    """Yield what the page cannot show, and the command that adds it; and which SAEs diverged."""
    without = [e.sae for e in evaluations if e.ce_loss_score is None]
    if without:
        which = "" if len(without) == len(evaluations) else f" for {', '.join(without)}"
        yield (
            f"Loss recovered is missing{which}: it needs the language model. "
            "Run `gsae eval RUN` where the model is available to add it."
        )
    if len({e.store_digest for e in evaluations}) > 1:
        yield "The runs were trained from different stores, so they were not measured on the same rows."
    ran = [e.language_model.documents for e in evaluations if e.language_model and e.language_model.documents]
    if few := few_documents(documents(evaluations), min(ran, default=None)):
        yield few
    old = [e.sae for e in evaluations if e.per_document is None]
    if old:
        which = "" if len(old) == len(evaluations) else f" of {', '.join(old)}"
        yield (
            f"The eval.json{which} is of an older version: its error bars are over contexts, and there is no interval "
            "over documents. Run `gsae eval RUN` again to add it."
        )
    for name, run in zip(names, runs, strict=True):
        if run.missing:
            yield f"Not evaluated in {name}: {', '.join(run.missing)}. Run `gsae eval` to add them."
    for e in evaluations:
        if e.diverged is not None:
            yield f"{e.sae} {diverged(e)}."
    if not has_curves:
        yield "There are no training curves: metrics.jsonl is missing or empty."


def diverged(e: Evaluation) -> str:
    """Say what became of an SAE that diverged."""
    then = f"was stopped; these are its weights of step {counts([e.steps or 0])}" if e.stopped else "was trained on"
    return f"diverged at step {counts([e.diverged or 0])} ({e.diverged_because}) and {then}"


def summary_paragraphs(groups: Mapping[Key, Sequence[Evaluation]], compared: Compared) -> list[str]:
    """Return a paragraph for each site, and what they rest on; one paragraph where there is one site."""
    found = [
        " ".join([_ratio(key[0], compared[key]), *_details(compared[key]), *_shrinkage(group)])
        for key, group in groups.items()
    ]
    everything = [e for group in groups.values() for e in group]
    rests = f"All numbers are over {counts(sorted({e.rows for e in everything}))} held-out rows"
    rests += ", from text that was not used for training."
    intervals = [c.interval for comparisons in compared.values() for c in comparisons.values() if c.interval]
    if intervals:
        held = sorted({e.heldout_documents for e in everything if e.heldout_documents is not None})
        rests += f" Intervals come from redrawing the {f'{counts(held)} ' if held else ''}held-out documents"
        if all(interval.seeds for interval in intervals):
            rests += " and the seeds."
        else:
            seeds = len({e.seed for e in everything})
            fitted = "one seed for each setting" if seeds == 1 else f"{seeds} seeds"
            rests += f". They do not cover the spread between fits ({fitted} here)."
    return [f"{found[0]} {rests}"] if len(found) == 1 else [*found, rests]


def tiles(groups: Mapping[Key, Sequence[Evaluation]], compared: Compared) -> list[dict[str, str]]:
    """Return the few numbers to read first. With several sites the paragraphs have them instead."""
    if len(groups) != 1:
        return []
    ((key, group),) = groups.items()
    shown = []
    for score in SCORES:
        comparison = compared[key][score]
        if comparison.ratio.value is not None:
            note = f"90\N{NO-BREAK SPACE}% interval {_interval(comparison)}" if comparison.interval else "no interval"
            note += f"; {_at(comparison)} at low, middle, high scores"
            label = f"baseline L0 over Gated L0 at equal {SCORE_NAMES[score]}"
            shown.append({"figure": f"{comparison.ratio.value:.1f}×", "label": label, "note": note})
    for architecture, name in ARCHITECTURES.items():
        if gammas := _gammas(group, architecture):
            label = f"gamma of the {name if name == 'Gated' else 'baseline'} SAEs"
            shown.append({"figure": _range(gammas), "label": label, "note": "1 means no shrinkage"})
    return shown


def _ratio(site: str, comparisons: Mapping[Score, Comparison]) -> str:
    found = {score: c for score, c in comparisons.items() if c.ratio.value is not None}
    if not found:
        reasons = "; ".join(f"for {SCORE_NAMES[s]}, {c.ratio.reason}" for s, c in comparisons.items())
        return f"On {site}, no ratio of active latents (L0) can be given: {reasons}."
    parts: list[str] = []
    for score, c in found.items():
        many = "as many" if parts else "as many active latents per token (L0) as the Gated SAEs"
        interval = f" (90\N{NO-BREAK SPACE}% interval {_interval(c)})" if c.interval else ""
        parts.append(f"{c.ratio.value:.1f} times {many} at equal {SCORE_NAMES[score]}{interval}")
    return f"On {site}, the baseline has {_listed(parts)}."


def _details(comparisons: Mapping[Score, Comparison]) -> Iterator[str]:
    """Yield where along the curves the first ratio holds, and what it is for each seed."""
    score, c = next(((s, c) for s, c in comparisons.items() if c.ratio.value is not None), (None, None))
    if score is None or c is None:
        return
    scores = ", ".join(f"{at.score:.2f}" for at in c.ratio.at)
    yield f"At a low, middle and high {SCORE_NAMES[score]} ({scores}) the ratio is {_at(c)}."
    if len(c.by_seed) > 1:
        own = [f"{'none' if ratio is None else f'{ratio:.1f}'} (seed {seed})" for seed, ratio in c.by_seed]
        yield f"It is that of the means over seeds; each seed alone has {_listed(own)}."


def _at(comparison: Comparison) -> str:
    return ", ".join(f"{at.ratio:.1f}" for at in comparison.ratio.at)


def _listed(parts: Sequence[str]) -> str:
    """Return `a, b and c`."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _shrinkage(group: Sequence[Evaluation]) -> list[str]:
    parts = [
        f"{_range(gammas)} for {'the baseline' if name == 'Baseline' else name}"
        for architecture, name in ARCHITECTURES.items()
        if (gammas := _gammas(group, architecture))
    ]
    meaning = "1 where reconstructions keep their size, below 1 where the sparsity penalty shrinks them"
    return [f"Gamma ({meaning}) is {' and '.join(parts)}."] if parts else []


def _gammas(group: Sequence[Evaluation], architecture: str) -> list[float]:
    return sorted(e.gamma for e in group if e.architecture == architecture and e.gamma is not None)


def _range(values: Sequence[float]) -> str:
    """Return the ends of a sorted list, with the third decimal that gamma needs near 1."""
    low, high = f"{values[0]:.3f}", f"{values[-1]:.3f}"
    return low if low == high else f"{low} to {high}"


def _span(low: float, high: float) -> str:
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"


def _interval(comparison: Comparison) -> str:
    return f"{comparison.interval.low:.1f} to {comparison.interval.high:.1f}" if comparison.interval else ""


def counts(rows: Sequence[int]) -> str:
    """Return the one number of a sorted list, or its two ends."""
    return f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
