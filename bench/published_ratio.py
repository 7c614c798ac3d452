"""The L0 ratio recomputed from the tables of docs/reproduction.md, with intervals that its scatter supports.

Run as `.venv/bin/python bench/published_ratio.py`. The curve of an architecture is a quadratic in log L0 through the
scores of all its SAEs of a site that did not break down (two seeds at six sparsities): the score is noisy and not even
monotonic, and a curve through every point follows the noise. The ratio is that of the L0 at which both curves have a
score; it is taken at 20, 50 and 80 % of the range of scores that both reach. Intervals cover 90 %: scores are drawn
again from a normal distribution around the curves, with the standard deviation of the residuals. They do not cover the
choice of the held-out documents, of which the tables rest on two.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGE = Path(__file__).parent.parent / "docs" / "reproduction.md"
SCORES = {"loss recovered": 3, "explained variance": 4}  # columns of the tables
DRAWS, PLACES = 4000, (0.2, 0.5, 0.8)
Floats = NDArray[np.float64]


def table(page: str, site: str, architecture: str, column: int) -> tuple[Floats, Floats]:
    """log L0 and score of every SAE of an architecture at a site, but those in italics."""
    section = page.split(f"\n### {site}\n")[1].split("\n### ")[0]
    points = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == architecture:
            l0, score = (cells[at].split(", ") for at in (2, column))
            points += [(float(a), float(b)) for a, b in zip(l0, score, strict=True) if "*" not in a]
    found = np.array(points)
    return np.log(found[:, 0]), found[:, 1]


def ratios(curves: list[tuple[Floats, Floats]]) -> Floats:
    """Baseline L0 over Gated L0 at the three places of the common range of scores; curves: Gated's, the baseline's."""
    grids = [np.linspace(x.min(), x.max(), 400) for x, _ in curves]
    fits = [
        np.maximum.accumulate(np.polyval(np.polyfit(x, y, 2), grid)) for (x, y), grid in zip(curves, grids, strict=True)
    ]
    low, high = max(fit[0] for fit in fits), min(fit[-1] for fit in fits)
    wanted = low + np.array(PLACES) * (high - low)
    gated, baseline = (np.interp(wanted, fit, grid) for fit, grid in zip(fits, grids, strict=True))
    return np.exp(baseline - gated)


def redrawn(curves: list[tuple[Floats, Floats]], draws: np.random.Generator) -> list[tuple[Floats, Floats]]:
    """The curves with scores drawn again around their fits."""
    again = []
    for x, y in curves:
        fit = np.polyval(np.polyfit(x, y, 2), x)
        sigma = np.sqrt(((y - fit) ** 2).sum() / (len(x) - 3))
        again.append((x, fit + sigma * draws.standard_normal(len(x))))
    return again


def main() -> None:
    """Print a line for each score and site."""
    page = PAGE.read_text()
    print("score | site | at the lowest fifth | middle | highest fifth (90 % intervals)")
    for score, column in SCORES.items():
        for site in re.findall(r"\n### (\S+)\n", page):
            curves = [table(page, site, architecture, column) for architecture in ("Gated", "baseline")]
            draws = np.random.default_rng(0)
            many = np.array([ratios(redrawn(curves, draws)) for _ in range(DRAWS)])
            low, high = np.nanquantile(many, (0.05, 0.95), axis=0)
            shown = [f"{r:.2f} ({a:.2f} to {b:.2f})" for r, a, b in zip(ratios(curves), low, high, strict=True)]
            print(" | ".join([score, site, *shown]))


if __name__ == "__main__":
    main()
