"""Cells of whole models, shared by the terminal's tables and the README's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..case import Row
from ..results import CaseRows
from ..runner import narrow_table
from .comparison import compared
from .peers import in_words


def models_table(cases: CaseRows) -> Table:
    """A row for each case, named by what differs from the first one, in 80 columns."""
    first = cases[0][0]
    ratios = ("over\nref.", "over\npeer", "of\npeak", "MiB\nref./ours", "labels\npeer/ours")
    table = narrow_table(f"images/s: {in_words(first)}", ("", "reference", "peer", "ours", *ratios))
    for case, rows in cases:
        reference, peer, ours = compared(rows)
        labels = pair(("" if row.labels is None else f"{100 * row.labels:.4g}" for row in (peer, ours)), "/")
        cells = (*speeds(rows), memory((reference, ours), "/"), labels and f"{labels}%")
        table.add_row(case_name(case, first), *map(escape, cells))
    return table


def case_name(case: dict[str, Any], first: dict[str, Any]) -> str:
    """The variant, and the parameters that differ from those of ``first``."""
    own = {key: value for key, value in case.items() if value != first.get(key)}
    return " ".join(filter(None, (case["variant"], case.get("part", ""), in_words(own))))


def speeds(rows: Sequence[Row]) -> tuple[str, ...]:
    """Cells: images/s of reference, peer and ours, the ratios of ours to the other two, and its share of the peak."""
    reference, peer, ours = three = compared(rows)
    ratios = (ours.images_s / row.images_s if ours.images_s and row.images_s else None for row in (reference, peer))
    return (
        *(f"{row.images_s:.3g}" if row.images_s else row.status for row in three),
        *("" if ratio is None else f"{ratio:.1f}x" for ratio in ratios),
        f"{ours.share:.0%}" if ours.share else "",
    )


def memory(rows: Sequence[Row], between: str) -> str:
    """Peaks in MiB, "154 / 8"."""
    peaks = [row.timing.peak_bytes if row.timing else None for row in rows]
    return pair(("" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks), between)


def pair(texts: Iterable[str], between: str) -> str:
    """ "a / b", or nothing where both are empty."""
    both = tuple(texts)
    return between.join(both) if any(both) else ""
