"""The live table of whole models: a row for each case that is done, and what is being done now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from .cases import OURS, Row
from .models import REFERENCE

HEADINGS = (
    "case", "reference", "best peer", "ours", "over reference", "over peer", "share of peak", "MiB reference / ours",
    "error peer / ours", "labels peer / ours",
)  # fmt: skip


class Board:
    """Counts ``jobs`` cases down; ``deadline`` is of ``time.monotonic``."""

    def __init__(self, jobs: int, deadline: float | None) -> None:
        self.jobs, self.deadline = jobs, deadline
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
        lines = [cells(op, case, rows) for case, rows in found]
        self.lines += lines
        texts = [
            f"{line[0]}: {', '.join(f'{h} {c}' for h, c in zip(HEADINGS[1:6], line[1:6], strict=True))}"
            for line in lines
        ]
        return "\n".join(f"[{self.done}/{self.jobs}, {time.monotonic() - self.start:.0f} s] {text}" for text in texts)

    def table(self) -> Table:
        table = Table(title="images/s")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "case" else "right")
        for line in self.lines:
            table.add_row(*(escape(cell) for cell in line))
        return table

    def render(self) -> RenderableType:
        if self.done == self.jobs:
            return self.table()
        elapsed = time.monotonic() - self.start
        left = "" if self.deadline is None else f", {max(0.0, self.deadline - time.monotonic()):.0f} s left"
        state = f"{self.done + 1} of {self.jobs}, {elapsed:.0f} s{left}: {self.now}: {self.doing}"
        return Group(*([self.table()] if self.lines else []), escape(state))


def best_peer(rows: Sequence[Row]) -> Row:
    """The fastest peer; where none has a time, the first with its reason."""
    peers = [row for row in rows if row.variant.startswith("peer")]
    return min(peers, key=lambda row: row.timing.median_ms if row.timing else float("inf"))


def cells(op: str, case: dict[str, Any], rows: Sequence[Row]) -> tuple[str, ...]:
    """One line of the table."""
    reference, ours = (next(row for row in rows if row.variant == name) for name in (REFERENCE, OURS))
    peer = best_peer(rows)
    name = f"{case['variant']} {case['size']} px x{case['batch']} K={case['classes']} {case['dtype']}"
    name += f", {case['part']}" if op == "split" else "" if case["compiled"] else ", not compiled"
    return (
        name,
        *(f"{row.images_s:.3g}" if row.images_s else row.status for row in (reference, peer, ours)),
        *(
            f"{ours.images_s / row.images_s:.1f}x" if ours.images_s and row.images_s else ""
            for row in (reference, peer)
        ),
        f"{ours.share:.0%}" if ours.share else "",
        " / ".join(_mebibytes(row) for row in (reference, ours)),
        " / ".join("" if row.error is None else f"{row.error:.1e}" for row in (peer, ours)),
        " / ".join("" if row.labels is None else f"{row.labels:.1%}" for row in (peer, ours)),
    )


def _mebibytes(row: Row) -> str:
    return f"{row.timing.peak_bytes / 2**20:.0f}" if row.timing and row.timing.peak_bytes is not None else ""
