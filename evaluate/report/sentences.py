"""What the comparison says, in words: the report's headline, its paragraph a site, its key figures.

Sentences are made here and not in the page, so that what is claimed of a run can be tested.
"""

from collections.abc import Mapping, Sequence

from .pareto import SCORES, Comparison, Score
from .runs import Evaluation

ARCHITECTURES = {"gated": "Gated", "relu": "Baseline"}
NAMES = ARCHITECTURES | {
    "gated-untied": "Gated, untied encoders",
    "gated-no_r_mag": "Gated without r_mag",
    "gated-unfrozen": "Gated, auxiliary decoder not frozen",
    "rescale-shift": "Baseline, rescaled and shifted",
}
SCORE_WORDS: dict[Score, str] = {
    "ce_loss_score": "loss recovered",
    "explained_variance": "explained variance",
}

Key = tuple[str, str]  # site, store digest: SAEs that may be compared
Compared = Mapping[Key, Mapping[Score, Comparison]]


def headline(compared: Compared) -> str:
    """The finding in one sentence: at equal loss recovered, else at equal explained variance, else none."""
    for score in SCORES:
        found = [c[score] for c in compared.values() if c[score].ratio.value is not None]
        if found:
            return _finding(found, SCORE_WORDS[score])
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


def summary_words(groups: Mapping[Key, Sequence[Evaluation]], compared: Compared) -> list[str]:
    """What was found, a paragraph a site, and what it rests on; one paragraph where there is one site."""
    found = [" ".join([_ratio(key[0], compared[key]), *_shrinkage(group)]) for key, group in groups.items()]
    everything = [e for group in groups.values() for e in group]
    rests = f"All figures are over {counts(sorted({e.rows for e in everything}))} held-out rows"
    rests += ", from text that no SAE was fitted to."
    if any(c.interval for comparisons in compared.values() for c in comparisons.values()):
        seeds = len({e.seed for e in everything})
        fitted = "one seed a setting" if seeds == 1 else f"{seeds} seeds"
        rests += f" Intervals redraw held-out contexts; they do not cover the spread between fits ({fitted} here)."
    return [f"{found[0]} {rests}"] if len(found) == 1 else [*found, rests]


def tiles(groups: Mapping[Key, Sequence[Evaluation]], compared: Compared) -> list[dict[str, str]]:
    """The few figures to be read first. With several sites they are in the paragraphs, not here."""
    if len(groups) != 1:
        return []
    ((key, group),) = groups.items()
    shown = []
    for score in SCORES:
        comparison = compared[key][score]
        if comparison.ratio.value is not None:
            note = f"90\N{NO-BREAK SPACE}% interval {_interval(comparison)}" if comparison.interval else "no interval"
            figure = f"{comparison.ratio.value:.1f}×"
            shown.append(
                {
                    "figure": figure,
                    "label": f"baseline L0 over Gated L0 at equal {SCORE_WORDS[score]}",
                    "note": note,
                }
            )
    for architecture, name in ARCHITECTURES.items():
        gammas = _gammas(group, architecture)
        if gammas:
            note = "1 means no shrinkage"
            shown.append(
                {
                    "figure": _range(gammas),
                    "label": f"gamma of the {name if name == 'Gated' else 'baseline'} SAEs",
                    "note": note,
                }
            )
    return shown


def _ratio(site: str, comparisons: Mapping[Score, Comparison]) -> str:
    found = {score: c for score, c in comparisons.items() if c.ratio.value is not None}
    if not found:
        reasons = "; ".join(f"for {SCORE_WORDS[s]}, {c.ratio.reason}" for s, c in comparisons.items())
        return f"On {site}, no ratio of active latents (L0) can be given: {reasons}."
    said: list[str] = []
    for score, c in found.items():
        many = "as many" if said else "as many active latents per token (L0) as the Gated SAEs"
        interval = f" (90\N{NO-BREAK SPACE}% interval {_interval(c)})" if c.interval else ""
        said.append(f"{c.ratio.value:.1f} times {many} at equal {SCORE_WORDS[score]}{interval}")
    return f"On {site}, the baseline has {' and '.join(said)}."


def _shrinkage(group: Sequence[Evaluation]) -> list[str]:
    told = [
        f"{_range(gammas)} for {'the baseline' if name == 'Baseline' else name}"
        for architecture, name in ARCHITECTURES.items()
        if (gammas := _gammas(group, architecture))
    ]
    meaning = "1 where reconstructions keep their size, below 1 where the sparsity penalty shrinks them"
    return [f"Gamma ({meaning}) is {' and '.join(told)}."] if told else []


def _gammas(group: Sequence[Evaluation], architecture: str) -> list[float]:
    return sorted(e.gamma for e in group if e.architecture == architecture and e.gamma is not None)


def _range(values: Sequence[float]) -> str:
    """Ends of a sorted list, with the third decimal that gamma needs near 1."""
    low, high = f"{values[0]:.3f}", f"{values[-1]:.3f}"
    return low if low == high else f"{low} to {high}"


def _span(low: float, high: float) -> str:
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"


def _interval(comparison: Comparison) -> str:
    return f"{comparison.interval.low:.1f} to {comparison.interval.high:.1f}" if comparison.interval else ""


def counts(rows: Sequence[int]) -> str:
    """One number or the ends of a sorted list of them."""
    return f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
