"""Rows of whole models in a table: images/s of reference, peers and ours, and the ratios."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..case import OURS, Row
from ..results import CaseRows
from ..runner import narrow_table
from .comparison import PEER, REFERENCE, RUNTIMES
from .peers import in_words


def compared(rows: Sequence[Row]) -> tuple[Row, Row, Row]:
    """The reference, the fastest peer in PyTorch (the first, with its reason, where none has a time), and ours."""
    reference, ours = (next(row for row in rows if row.variant == name) for name in (REFERENCE, OURS))
    return reference, fastest(row for row in rows if row.variant.startswith(PEER)), ours


def fastest(rows: Iterable[Row]) -> Row:
    """The fastest row; the first where none has a time."""
    return min(rows, key=lambda row: row.timing.median_ms if row.timing else float("inf"))


def runtimes_of(cases: CaseRows) -> list[str]:
    """The runtimes that are not absent from every case."""
    return [
        name for name in RUNTIMES if any(r.variant == name and r.status != "absent" for _, rows in cases for r in rows)
    ]


def models_table(cases: CaseRows) -> Table:
    """A row for each case and its token mergings, named by what differs from the first one, in 80 columns.

    "Over peer" is over the fastest one, of PyTorch and of the runtimes.
    """
    first, runtimes = cases[0][0], runtimes_of(cases)
    headings = ["reference", "peer", *(name.replace("VINO", "\nVINO").replace(" ", "\n") for name in runtimes), "ours"]
    headings += ["over\nref.", "over\npeer", "MiB\nref./ours"]
    if not runtimes:
        headings += ["of\npeak", "labels\npeer/ours"]
    table = narrow_table(f"images/s: {in_words(first)}", ("", *headings))
    for case, rows in cases:
        reference, peer, exact = compared(rows)
        others = [row for row in rows if row.variant in runtimes]
        for ours in (exact, *(row for row in rows if row.variant.startswith(f"{OURS} "))):
            cells = [speed(row) for row in (reference, peer, *others, ours)]
            cells += [gain(ours, reference), gain(ours, fastest([peer, *others])), memory((reference, ours), "/")]
            if not runtimes:
                labels = pair(("" if row.labels is None else f"{100 * row.labels:.4g}" for row in (peer, ours)), "/")
                cells += [f"{ours.share:.0%}" if ours.share else "", labels and f"{labels}%"]
            table.add_row(case_name(case, first) + ours.variant.removeprefix(OURS), *map(escape, cells))
    return table


def case_name(case: dict[str, Any], first: dict[str, Any]) -> str:
    """The variant, and the parameters that differ from those of ``first``."""
    own = {key: value for key, value in case.items() if value != first.get(key)}
    return " ".join(filter(None, (case["variant"], case.get("part", ""), in_words(own))))


def speed(row: Row) -> str:
    """Images/s, or the reason for none in a word."""
    if not row.images_s:
        return row.status
    return f"{row.images_s:.0f}" if row.images_s >= 1000 else f"{row.images_s:.3g}"


def gain(ours: Row, other: Row) -> str:
    """ "1.75x" where both have a speed."""
    return f"{ours.images_s / other.images_s:.2f}x" if ours.images_s and other.images_s else ""


def memory(rows: Sequence[Row], between: str) -> str:
    """Peaks in MiB, "154 / 8"."""
    peaks = [row.timing.peak_bytes if row.timing else None for row in rows]
    return pair(("" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks), between)


def pair(texts: Iterable[str], between: str) -> str:
    """ "a / b", or nothing where both are empty."""
    both = tuple(texts)
    return between.join(both) if any(both) else ""
