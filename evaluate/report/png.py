"""The report's plots as PNG files for papers: 300 dpi, no serifs, colours that stay apart in print.

matplotlib draws them from the same data as the page, so that both show the same. It is an extra (`gsae[plots]`) and is
imported only here, because the page does not need it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gsae.errors import NotFoundError
from gsae.files import disk_errors, replacing

from .page_data import Page, make_page
from .runs import read_run
from .shown_metrics import METRICS

WIDE, TALL, LEGEND, DPI = 3.4, 2.4, 0.13, 300  # inches: a column of most journals; a line of the legend
COLORS = {"gated": ("#0a5cab", "#007d85", "#4a40b8"), "relu": ("#bd5300", "#a8324e", "#806600")}
OTHERS = ("#00735a", "#8441a8", "#a01a7d", "#5a6b00", "#5c6470")
MARKERS = {"gated": "o", "relu": "D"}
LINES = ("-", "--", ":", "-.")
DENSITY = "density"  # the name of the plot that is not of one metric


def write_plots(runs: Sequence[Path], folder: Path) -> list[Path]:
    """Write a PNG file for each plot that the runs have values for; return the files.

    The same runs give the same bytes. Raises NotFoundError where matplotlib is not installed, and what `report` raises
    for the runs.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise NotFoundError("--png needs matplotlib, which is not installed: pip install 'gsae[plots]'.") from None
    page = make_page([read_run(run) for run in runs], "")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    labels = [series.label for series in page.series]
    columns = 2 if max(map(len, labels)) < 30 else 1
    tall = TALL + LEGEND * -(-len(labels) // columns)
    written = []
    for name, draw in plots(page):
        figure = Figure(figsize=(WIDE, tall), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        axes.tick_params(labelsize=7)
        figure.legend(loc="outside upper left", ncols=columns, fontsize=6, frameon=False)
        written.append(folder / f"{name}.png")
        with replacing(written[-1], shared=True) as temporary:
            # Without `Software`, which would name matplotlib's version.
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return written


def plots(page: Page) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Yield the name of each plot and the function that draws it on axes."""
    for metric in METRICS:
        if metric.png and any(sae[metric.key] is not None and sae["l0"] for sae in page.saes):
            yield metric.png, partial(draw_against_l0, page, metric.key, metric.axis)
    if any(sae["density"] for sae in page.saes):
        yield DENSITY, partial(draw_densities, page)


def styles(page: Page) -> list[dict[str, Any]]:
    """Return colour, marker and line of each series: colours by architecture, shades and dashes by its nth series."""
    seen: dict[str, int] = {}
    strange: dict[str, int] = {}
    found = []
    for series in page.series:
        kind = series.architecture
        nth = seen[kind] = seen.get(kind, -1) + 1
        shades = COLORS.get(kind) or (OTHERS[strange.setdefault(kind, len(strange)) % len(OTHERS)],)
        line = LINES[nth % len(LINES)]
        found.append({"color": shades[nth % len(shades)], "marker": MARKERS.get(kind, "s"), "linestyle": line})
    return found


def draw_against_l0(page: Page, key: str, label: str, axes: Any) -> None:
    """Draw a metric against L0: bands over seeds, Pareto fronts of scores, error bars of 1.96 standard errors."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for series, style in zip(page.series, styles(page), strict=True):
        usable = [i for i in series.saes if page.saes[i][key] is not None and page.saes[i]["l0"]]
        usable.sort(key=lambda i: page.saes[i]["l0"])
        joined = series.fronts.get(key, usable)
        band = series.bands.get(key)
        if band:
            l0, low, high = zip(*band, strict=True)
            axes.fill_between(l0, low, high, color=style["color"], alpha=0.15, linewidth=0)
        points = [page.saes[i] for i in joined]
        line = {"color": style["color"], "linestyle": style["linestyle"], "label": plain(series.label)}
        axes.plot([p["l0"] for p in points], [p[key] for p in points], **line, linewidth=1.1)
        points = [page.saes[i] for i in usable]
        wide, tall = ([1.96 * (p["errors"].get(k) or 0) for p in points] for k in ("l0", key))
        marks = {"marker": style["marker"], "color": style["color"], "linestyle": "none", "markersize": 3}
        axes.errorbar([p["l0"] for p in points], [p[key] for p in points], tall, wide, **marks, elinewidth=0.6)
    if key.startswith("gamma"):
        axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("L0 (active latents per token)", fontsize=8)
    axes.set_ylabel(label, fontsize=8)


def draw_densities(page: Page, axes: Any) -> None:
    """Draw each SAE's histogram of how often its latents fire."""
    for series, style in zip(page.series, styles(page), strict=True):
        drawn = [page.saes[i]["density"] for i in series.saes if page.saes[i]["density"]]
        for nth, points in enumerate(drawn):
            label = plain(series.label) if nth == 0 else None
            shown = {"color": style["color"], "linestyle": style["linestyle"], "label": label}
            axes.plot([x for x, _ in points], [y for _, y in points], **shown, linewidth=0.9, alpha=0.8)
    axes.set_xlabel("log10 of the share of rows on which a latent fires", fontsize=8)
    axes.set_ylabel("share of the SAE's latents", fontsize=8)


def plain(label: str) -> str:
    """Return a name with its dollar signs escaped, which matplotlib would take for mathematics."""
    return label.replace("$", r"\$")
