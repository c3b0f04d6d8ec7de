"""The live table of whole models: a row for each case that is done, and what is being done now."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from .cases import OURS, Row
from .models import REFERENCE, Point, in_words
from .run import narrow_table

# All fit into 80 columns.
HEADINGS = (
    "",
    "reference",
    "peer",
    "ours",
    "over\nref.",
    "over\npeer",
    "of\npeak",
    "MiB\nref./ours",
    "labels\npeer/ours",
)
AROUND = 7  # lines of a terminal that are no rows: title, headings, rule, progress (which may wrap), the prompt


class Board:
    """Counts a case for each of ``points`` down; ``deadline`` is of ``time.monotonic``.

    Where not all rows fit into the terminal, the last are shown until the end.
    """

    def __init__(self, points: Sequence[Point], deadline: float | None) -> None:
        self.jobs, self.deadline = len(points), deadline
        self.first = points[0].parameters
        self.done = 0
        self.start = time.monotonic()
        self.now = self.doing = ""
        self.lines: list[tuple[str, ...]] = []

    def begin(self, name: str) -> None:
        self.now, self.doing = name, ""

    def tell(self, doing: str) -> None:
        self.doing = doing

    def end(self, op: str, found: Sequence[tuple[dict[str, Any], list[Row]]]) -> str:
        """Take up what a job found; return it as one line of a log."""
        self.done += 1
        lines = [(self._name(op, case), *cells(rows)) for case, rows in found]
        self.lines += lines
        texts = []
        for name, *line in lines:
            told = [f"{heading} {cell}" for heading, cell in zip(HEADINGS[1:6], line[:5], strict=True) if cell]
            texts.append(f"{name}: {', '.join(told)}".replace("\n", " "))
        return "\n".join(f"[{self.done}/{self.jobs}, {time.monotonic() - self.start:.0f} s] {text}" for text in texts)

    def _name(self, op: str, case: dict[str, Any]) -> str:
        """The variant, and what is not as the title says."""
        own = {key: value for key, value in case.items() if value != self.first.get(key)}
        if op != "throughput":  # parts and classes are never compiled
            own.pop("compiled", None)
        return " ".join(filter(None, (case["variant"], case.get("part", ""), in_words(own))))

    def table(self, lines: Sequence[tuple[str, ...]]) -> Table:
        table = narrow_table(f"images/s: {in_words(self.first)}", HEADINGS)
        for line in lines:
            table.add_row(*(escape(cell) for cell in line))
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.done == self.jobs:
            yield self.table(self.lines)
            return
        heights = accumulate(1 + line[0].count(" ") for line in reversed(self.lines))
        shown = sum(height <= console.height - AROUND for height in heights)
        if shown:
            yield self.table(self.lines[-shown:])
        elapsed = time.monotonic() - self.start
        left = "" if self.deadline is None else f", {max(0.0, self.deadline - time.monotonic()):.0f} s left"
        yield escape(f"{self.done + 1} of {self.jobs}, {elapsed:.0f} s{left}: {self.now}: {self.doing}")


def compared(rows: Sequence[Row]) -> tuple[Row, Row, Row]:
    """The reference, the fastest peer, ours. Where no peer has a time it is the first, with its reason."""
    reference, ours = (next(row for row in rows if row.variant == name) for name in (REFERENCE, OURS))
    peers = [row for row in rows if row.variant.startswith("peer")]
    return reference, min(peers, key=lambda row: row.timing.median_ms if row.timing else float("inf")), ours


def speeds(rows: Sequence[Row]) -> tuple[str, ...]:
    """Cells: images/s of the three that are compared, what ours is over the first two, its share of the peak."""
    reference, peer, ours = three = compared(rows)
    return (
        *(f"{row.images_s:.3g}" if row.images_s else row.status for row in three),
        *(
            f"{ours.images_s / row.images_s:.1f}x" if ours.images_s and row.images_s else ""
            for row in (reference, peer)
        ),
        f"{ours.share:.0%}" if ours.share else "",
    )


def cells(rows: Sequence[Row]) -> tuple[str, ...]:
    """A line of the table but for its name."""
    reference, peer, ours = compared(rows)
    labels = pair(("" if row.labels is None else f"{100 * row.labels:.4g}" for row in (peer, ours)), "/")
    return (*speeds(rows), memory((reference, ours), "/"), labels and f"{labels}%")


def memory(rows: Sequence[Row], between: str) -> str:
    """Peaks in MiB, "154 / 8"."""
    peaks = [row.timing.peak_bytes if row.timing else None for row in rows]
    return pair(("" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks), between)


def pair(texts: Iterable[str], between: str) -> str:
    """ "a / b", or nothing where neither is there."""
    both = tuple(texts)
    return between.join(both) if any(both) else ""
