"""How many rows of a store have a NaN or an infinity, by site and split: counted in the moments, so nothing is read."""

from gsae.store.format.row_order import SPLITS
from gsae.store.read.store import Store

SHOWN_SITES = 6


def nonfinite_rows(store: Store) -> dict[str, dict[str, int]]:
    """Return the number of rows with a NaN or an infinity in each split, of the sites that have any."""
    found: dict[str, dict[str, int]] = {
        site.name: {split: store.site(site.name, split).moments.non_finite for split in SPLITS}
        for site in store.plan.sites
    }
    return {name: counts for name, counts in found.items() if any(counts.values())}


def nonfinite_note(store: Store) -> str | None:
    """Return one line about these rows; None if there are none."""
    found = nonfinite_rows(store)
    if not found:
        return None
    rows = sum(store.site(store.plan.sites[0].name, split).rows for split in SPLITS)
    counts = {name: sum(by_split.values()) for name, by_split in found.items()}
    return (
        f"{store.name} has rows with a NaN or an infinity: {listed_shares(counts, rows)}. "
        "gsae train leaves them out with --skip-nonfinite."
    )


def listed_shares(counts: dict[str, int], rows: int) -> str:
    """Return the number and the share of `rows` for each site, the largest first: `resid.1 2 of 512 (0.391 %)`."""
    ordered = sorted(((name, count) for name, count in counts.items() if count), key=lambda one: -one[1])
    shown = [f"{name} {count:,} of {rows:,} ({100 * count / rows:.3g} %)" for name, count in ordered[:SHOWN_SITES]]
    more = len(ordered) - len(shown)
    return ", ".join(shown) + (f", and {more} more sites" if more else "")
