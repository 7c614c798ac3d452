"""What the commands show: progress on stderr, and documents, facts and tables on stdout.

On a terminal progress is a bar or a live table; in a log it is a line every few seconds. The other rooms report events
to a listener, and the commands turn these into calls of `show`.
"""

import json
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_TABLES = 5.0, 60.0
FACTS_WIDTH = 100  # columns of a printed line of facts, but for a word that is longer
RUN_COLUMNS = ("sae", "l0", "explained_variance", "gamma", "dead", "dead_rows", "loss")  # of a table of a run's SAEs
PIPED_WIDTH = 10_000  # columns of a table that goes to a file or a pipe: wide enough not to wrap any


def print_json(value: Any) -> None:
    """Print one JSON document to stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print named values to stdout, one a line: nested ones indented, lists of records as tables."""
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, inner in value.items():
                print(_wrapped(f"  {name}: {_text(inner)}"))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{key}:")
            print_table(tuple(value[0]), value)
        else:
            print(_wrapped(f"{key}: {_text(value)}"))


def print_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print records as a table to stdout: the first column to the left, the others, mostly numbers, to the right.

    A terminal wraps long cells. A file or pipe gets one line a record, however long.
    """
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    table = Table(box=None, pad_edge=False, header_style=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    console.print(table)


def print_divergences(saes: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each SAE of a run that diverged in training."""
    for sae in saes:
        if sae.get("diverged") is not None:
            then = "stopped, with its last healthy weights" if sae.get("stopped") is not None else "trained on"
            back = len(sae.get("retries") or ())
            often = f"went back to healthy weights {back} times, " if back > 1 else "went back once, " if back else ""
            because = sae.get("diverged_because")
            print(f"\n{sae['sae']} diverged at step {sae['diverged']:,}: {because}; {often}{then}.")


def _wrapped(line: str) -> str:
    """Break a long line between words; what follows is indented under it."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return "\n".join(
        textwrap.wrap(line, FACTS_WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    )


def _text(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case dict():
            return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
        case list() | tuple():
            return ", ".join(map(_text, value)) or "-"
    return str(value)


class Shown:
    """Progress of one command, one stage at a time. Use it in a `with`."""

    def __init__(self, stream: TextIO | None = None, every: float = SECONDS_BETWEEN_LINES) -> None:
        """Show on `stream`, stderr if None: a bar when it is a terminal, else a line every `every` seconds."""
        stream = stream or sys.stderr
        console = Console(file=stream)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=console) if console.is_terminal else None
        self._stream, self._every = stream, every
        self._stage: str | None = None
        self._task: TaskID | None = None
        self._began = self._printed = 0.0
        self._first = 0

    def show(self, stage: str, done: int = 0, total: int | None = None, detail: str = "") -> None:
        """Show that `done` of `total` of a stage is done. A new name of the stage starts a new bar or line."""
        new = stage != self._stage
        if new:
            self._stage, self._began, self._first = stage, time.monotonic(), done
        if self._bars is not None:
            if new:
                self._task = self._bars.add_task(stage, total=total, detail=detail)
            self._bars.update(self._task or TaskID(0), completed=done, total=total, detail=detail)
        elif new or time.monotonic() - self._printed >= self._every or (total is not None and done == total):
            self._printed = time.monotonic()
            rate = (done - self._first) / max(self._printed - self._began, 1e-9)
            print(_line(stage, done, total, detail, rate), file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Show one line, above the bars."""
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()


class TrainingShown:
    """Progress of a training run. Use it in a `with`.

    On a terminal it is a live table of the SAEs. In a log it is a line every few seconds, and the figures of all SAEs
    every minute and at the end.
    """

    COLUMNS = ("sae", "L0", "explained variance", "gamma", "loss", "dead", "path", "held-out L0", "held-out e.v.")

    def __init__(
        self,
        stream: TextIO | None = None,
        every: float = SECONDS_BETWEEN_LINES,
        tables_every: float = SECONDS_BETWEEN_TABLES,
    ) -> None:
        """Show on `stream`, stderr if None; `every`, `tables_every`: seconds between lines, and tables, in a log."""
        self._stream, self._every, self._tables_every = stream or sys.stderr, every, tables_every
        self._console = Console(file=self._stream)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._heldout: dict[str, Mapping[str, Any]] = {}
        self._printed = self._listed = 0.0
        self._first: tuple[int, float] | None = None

    def say(self, text: str) -> None:
        """Show one line, above the table."""
        if self._live is not None:
            self._console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def figures(
        self, step: int, steps: int, rows_per_second: float, waiting: float, lines: Sequence[Mapping[str, Any]]
    ) -> None:
        """Show the newest lines of metrics. waiting: share of the time spent waiting for data, 0 to 1."""
        self._heldout |= {line["sae"]: line["heldout"] for line in lines if "heldout" in line}
        head = f"step {step:,} of {steps:,} ({100 * step / steps:.0f} %), {rows_per_second:,.0f} rows/s, "
        head += f"waiting for data {100 * waiting:.0f} %{self._left(step, steps)}"
        head += "".join(f", dead over {rows:,} rows" for rows in {line.get("dead_rows") for line in lines} if rows)
        rows = [self._cells(line) for line in lines]
        if self._live is not None:
            table = Table(title=head, title_justify="left", box=None)
            for column in self.COLUMNS:
                table.add_column(column, justify="left" if column in ("sae", "path") else "right")
            for cells in rows:
                table.add_row(*cells)
            self._live.update(table, refresh=True)
        elif step == steps or time.monotonic() - self._printed >= self._every:
            self._printed = time.monotonic()
            print(head, file=self._stream, flush=True)
            if step == steps or self._printed - self._listed >= self._tables_every:
                self._listed = self._printed
                self._list(rows)

    def _left(self, step: int, steps: int) -> str:
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:  # groups that follow others begin again
            self._first = step, now
        first, then = self._first
        return f", {(steps - step) * (now - then) / (step - first):.0f} s left" if first < step < steps else ""

    def _list(self, rows: list[list[str]]) -> None:
        for cells in rows:
            shown = (f"{name} {cell}" for name, cell in zip(self.COLUMNS[1:], cells[1:], strict=True) if cell != "-")
            print(f"  {cells[0]}: {', '.join(shown)}", file=self._stream, flush=True)

    def _cells(self, line: Mapping[str, Any]) -> list[str]:
        held = self._heldout.get(line["sae"], {})
        numbers = (
            (line["l0"], ".1f"), (line["explained_variance"], ".4f"), (line["gamma"], ".3f"), (line["loss"], ".4f"),
            (line["dead"], ".1%"),
        )  # fmt: skip
        shown = [_number(value, form) for value, form in numbers]
        path = "stopped" if "stopped" in line else "diverged" if "diverged" in line else str(line["path"])
        rest = [_number(held.get("l0"), ".1f"), _number(held.get("explained_variance"), ".4f")]
        return [str(line["sae"]), *shown, path, *rest]

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(stage: str, done: int, total: int | None, detail: str, rate: float) -> str:
    """Return one line of a log. rate: units per second, 0 while unknown."""
    parts = []
    if total:
        parts.append(f"{done:,} of {total:,} ({100 * done / total:.0f} %)")
        if rate and done < total:
            parts.append(f"{(total - done) / rate:.0f} s left")
    parts += [detail] if detail else []
    return f"{stage}: {', '.join(parts)}" if parts else stage
