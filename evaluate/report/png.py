"""The report's plots as PNG files for papers: small, 300 dpi, serif-free, colours that print apart.

Drawn by matplotlib from what the page is drawn from, so that both show the same. matplotlib is an extra
(`gsae[plots]`), imported when first needed: the page needs nothing, and a browser that takes pictures of itself would
be the more fragile dependency.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gsae.errors import NotFoundError

from .report import page
from .runs import read_run

WIDE, TALL, LEGEND, DPI = 3.4, 2.4, 0.13, 300  # inches: a column of most journals; a line of the legend
COLORS = {"gated": ("#0a5cab", "#007d85", "#4a40b8"), "relu": ("#bd5300", "#a8324e", "#806600")}
OTHERS = ("#00735a", "#8441a8", "#a01a7d", "#5a6b00", "#5c6470")
MARKERS = {"gated": "o", "relu": "D"}
LINES = ("-", "--", ":", "-.")
SCORES = {
    "loss-recovered": ("ce_loss_score", "loss recovered"),
    "kl-recovered": ("kl_div_score", "KL divergence recovered"),
    "explained-variance": ("explained_variance", "explained variance"),
    "gamma": ("gamma", "relative reconstruction bias"),
    "gamma-centred": ("gamma_centred", "bias about the mean row"),
    "dead": ("dead", "share of dead latents"),
    "dense": ("dense", "share of dense latents"),
}

Page = Mapping[str, Any]


def figures(runs: Sequence[Path], folder: Path) -> list[Path]:
    """Write a PNG for each plot that the runs have figures for; return them. The same runs give the same bytes.

    Raises NotFoundError where matplotlib is not installed, and what `report` raises for the runs.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise NotFoundError("--png needs matplotlib, which is not installed: pip install 'gsae[plots]'.") from None
    data = page([read_run(run) for run in runs], "")
    folder.mkdir(parents=True, exist_ok=True)
    labels = [series["label"] for series in data["series"]]
    columns = 2 if max(map(len, labels)) < 30 else 1
    tall = TALL + LEGEND * -(-len(labels) // columns)
    written = []
    for name, draw in plots(data):
        figure = Figure(figsize=(WIDE, tall), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        axes.tick_params(labelsize=7)
        figure.legend(loc="outside upper left", ncols=columns, fontsize=6, frameon=False)
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], metadata={"Software": None})  # it would name matplotlib's version
    return written


def plots(data: Page) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Yield names of plots and what draws each on axes."""
    for name, (key, label) in SCORES.items():
        if any(sae[key] is not None and sae["l0"] for sae in data["saes"]):
            yield name, partial(against_l0, data, key, label)
    if any(sae["density"] for sae in data["saes"]):
        yield "density", partial(densities, data)


def styles(data: Page) -> list[dict[str, Any]]:
    """Return colour, marker and line of each series: a family of colours an architecture, shades for its sites."""
    seen: dict[str, int] = {}
    strange: dict[str, int] = {}
    found = []
    for series in data["series"]:
        kind = series["architecture"]
        nth = seen[kind] = seen.get(kind, -1) + 1
        shades = COLORS.get(kind) or (OTHERS[strange.setdefault(kind, len(strange)) % len(OTHERS)],)
        line = LINES[nth % len(LINES)]
        found.append({"color": shades[nth % len(shades)], "marker": MARKERS.get(kind, "s"), "linestyle": line})
    return found


def against_l0(data: Page, key: str, label: str, axes: Any) -> None:
    """Draw a figure against L0: bands over seeds, fronts where there are any, error bars of 1.96 standard errors."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for series, style in zip(data["series"], styles(data), strict=True):
        usable = [i for i in series["saes"] if data["saes"][i][key] is not None and data["saes"][i]["l0"]]
        usable.sort(key=lambda i: data["saes"][i]["l0"])
        joined = series["fronts"].get(key, usable)
        band = series["bands"].get(key)
        if band:
            l0, low, high = zip(*band, strict=True)
            axes.fill_between(l0, low, high, color=style["color"], alpha=0.15, linewidth=0)
        points = [data["saes"][i] for i in joined]
        line = {"color": style["color"], "linestyle": style["linestyle"], "label": plain(series["label"])}
        axes.plot([p["l0"] for p in points], [p[key] for p in points], **line, linewidth=1.1)
        points = [data["saes"][i] for i in usable]
        wide, tall = ([1.96 * (p["errors"].get(k) or 0) for p in points] for k in ("l0", key))
        marks = {"marker": style["marker"], "color": style["color"], "linestyle": "none", "markersize": 3}
        axes.errorbar([p["l0"] for p in points], [p[key] for p in points], tall, wide, **marks, elinewidth=0.6)
    if key.startswith("gamma"):
        axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("L0 (active latents a token)", fontsize=8)
    axes.set_ylabel(label, fontsize=8)


def densities(data: Page, axes: Any) -> None:
    """Draw each SAE's histogram of how often its latents fire."""
    for series, style in zip(data["series"], styles(data), strict=True):
        drawn = [data["saes"][i]["density"] for i in series["saes"] if data["saes"][i]["density"]]
        for nth, points in enumerate(drawn):
            label = plain(series["label"]) if nth == 0 else None
            shown = {"color": style["color"], "linestyle": style["linestyle"], "label": label}
            axes.plot([x for x, _ in points], [y for _, y in points], **shown, linewidth=0.9, alpha=0.8)
    axes.set_xlabel("log10 of the share of rows on which a latent fires", fontsize=8)
    axes.set_ylabel("share of the SAE's latents", fontsize=8)


def plain(label: str) -> str:
    """Return a name that matplotlib takes for text, not for mathematics."""
    return label.replace("$", r"\$")
