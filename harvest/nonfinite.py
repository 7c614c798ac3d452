"""Rows with a NaN or an infinity: when they end a harvest, and what the harvest reports about them.

A model that overflows in its dtype gives such rows, usually most of them. So the first window of a worker must have
none. A later window may have one row in `RARE` at a site, because a rare overflow should not end a harvest of a day;
more end it too. The counts are those of the moments, so the check costs nothing. A window is checked before it is
published.
"""

from collections import Counter
from collections.abc import Callable, Mapping

from gsae.errors import UsageError
from gsae.store import Moments, Record, Split, listed_shares

RARE = 1000
NAMES = "rows with a NaN or an infinity"


class NonfiniteRows:
    """Checks the windows of one worker, and counts the rows with a NaN or an infinity in them."""

    def __init__(self, allowed: bool, first: tuple[tuple[Split, int], ...], note: Callable[[str], None]) -> None:
        """Begin to count.

        allowed: check nothing. first: the window of the worker that must have none. note: gets a line at the first
        window that has some.
        """
        self._allowed, self._first, self._note = allowed, first, note
        self._counts: Counter[str] = Counter()
        self._rows = 0

    def check(self, split: Split, window: int, moments: Mapping[str, Moments]) -> None:
        """Raise UsageError if a window has too many such rows; moments: of each site."""
        if self._allowed:
            return
        counts = {name: each.non_finite for name, each in moments.items()}
        rows = next(each.rows + each.non_finite for each in moments.values())
        most = 0 if (split, window) in self._first else rows // RARE
        if max(counts.values()) > most:
            raise UsageError(refusal(f"Window {split}-{window:05d}", counts, rows))

    def count(self, record: Record) -> None:
        """Count the rows of a published window."""
        counts = {name: each.non_finite for name, each in record.moments.items() if each.non_finite}
        rows = record.arrays[0].rows
        if counts and not self._counts:
            self._note(f"Window {record.split}-{record.window:05d} has {NAMES}: {listed_shares(counts, rows)}.")
        self._counts.update(counts)
        self._rows += rows

    @property
    def total(self) -> str | None:
        """One line about all windows that were counted; None if no row has a NaN or an infinity."""
        if not self._counts:
            return None
        return f"The windows of this call have {NAMES}: {listed_shares(dict(self._counts), self._rows)}."


def refusal(where: str, counts: Mapping[str, int], rows: int) -> str:
    """Return what ends a harvest: which sites have how many such rows of `rows`, and what to do."""
    return (
        f"{where} has {NAMES}: {listed_shares(dict(counts), rows)}. The model overflows in its dtype: harvest into "
        "another folder with another --dtype, or store such rows with --allow-nonfinite."
    )
