"""The metrics of eval.json that a report shows: in its table, its definitions, its CSV file and its plots.

A new metric is one entry here, after a field in `eval_json.py` and its value in `metrics.py`. The tables, the CSV
file and the PNG files follow from the entry; a plot on the page is drawn by its script.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric in a report.

    key: its field of `Evaluation`. head: of its column in the table, "" for a metric that only the CSV file has.
    form: how the table writes it, by a function of page/data.js: `active`, `fixed(3)`, `short` or `share`.
    term, definition: HTML below the table. png, axis: name of the PNG file and its axis title, "" for no plot.
    has_error: whether its standard error is shown.
    """

    key: str
    head: str = ""
    form: str = ""
    term: str = ""
    definition: str = ""
    png: str = ""
    axis: str = ""
    has_error: bool = False


METRICS = (
    Metric(
        "l0",
        "L0",
        "active",
        term="L0",
        definition="Mean number of latents that are not zero in a row.",
        has_error=True,
    ),
    Metric(
        "ce_loss_score",
        "loss recovered",
        "fixed(3)",
        term="Loss recovered",
        definition="1 − (CE<sub>spliced</sub> − CE<sub>clean</sub>) / (CE<sub>zero</sub> − CE<sub>clean</sub>): CE is "
        "the language model’s cross-entropy with the reconstruction in place of the activation (spliced), with the "
        "activation itself (clean), and with zeros in its place (zero). Positions that are not rows of the store keep "
        "the model’s own activation in all three. In eval.json: <code>ce_loss_score</code>.",
        png="loss-recovered",
        axis="loss recovered",
        has_error=True,
    ),
    Metric("ce_loss_score_mean"),
    Metric("ce_loss_score_all_positions"),
    Metric(
        "kl_div_score",
        "KL recovered",
        "fixed(3)",
        term="KL recovered",
        definition="1 − KL<sub>spliced</sub> / KL<sub>zero</sub>: KL is the divergence of the next token’s "
        "distribution from that of the unchanged model. In eval.json: <code>kl_div_score</code>.",
        png="kl-recovered",
        axis="KL divergence recovered",
        has_error=True,
    ),
    Metric(
        "explained_variance",
        "explained variance",
        "fixed(3)",
        term="Explained variance",
        definition="1 − Σ‖<i>x</i> − <i>x̂</i>‖² / Σ‖<i>x</i> − <i>x̄</i>‖².",
        png="explained-variance",
        axis="explained variance",
        has_error=True,
    ),
    Metric(
        "mse",
        "MSE",
        "short",
        term="MSE",
        definition="Mean of ‖<i>x</i> − <i>x̂</i>‖², summed over dimensions, in the activations’ own units.",
    ),
    Metric(
        "gamma",
        "gamma",
        "fixed(3)",
        term="Gamma",
        definition="Relative reconstruction bias, E‖<i>x̂</i>‖² / E[<i>x̂</i>·<i>x</i>]; 1 where there is no shrinkage "
        "(Rajamanoharan et al. 2024, eqs. 9 and 10). Centred: the same with <i>x̄</i> taken from both, so that a large "
        "mean cannot hide shrinkage.",
        png="gamma",
        axis="relative reconstruction bias",
        has_error=True,
    ),
    Metric("gamma_centred", "gamma, centred", "fixed(3)", png="gamma-centred", axis="bias about the mean row"),
    Metric("cossim"),
    Metric("l2_ratio"),
    Metric(
        "dead",
        "dead",
        "share",
        term="Dead, silent, dense",
        definition="Shares of latents. Dead: did not fire on the last training rows (10 million, an epoch, or all of a "
        "shorter run; the column “dead over” has their number). "
        "Silent: fire on no held-out row. Dense: fire on more than 10 % of the held-out rows.",
        png="dead",
        axis="share of dead latents",
    ),
    Metric("dead_rows", "dead over", "count"),
    Metric("silent", "silent", "share"),
    Metric("dense", "dense", "share", png="dense", axis="share of dense latents"),
)
ERRORS = tuple(metric.key for metric in METRICS if metric.has_error)


def columns_js() -> str:
    """Return the entries of the page's list of columns, a line each."""
    return "\n".join(f'  ["{m.key}", "{m.head}", {m.form}],' for m in METRICS if m.head)


def definitions_html() -> str:
    """Return the definitions of the page, a line each."""
    rows = [f"<div><dt>{m.term}</dt><dd>{m.definition}</dd></div>" for m in METRICS if m.term]
    return "\n".join(f"      {row}" for row in rows)
