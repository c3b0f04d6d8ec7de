"""Comparison of two result folders of one device, such as ``results/<device>`` of two checkouts.

Rows are matched by op, parameters and variant. A row differs only where the two spreads, p20 to p80, stay apart by more
than runs of one program do, and by more than all peers moved that took turns with it: the peers are the same program
in both folders, so they show how the speed of the machine changed. Peak memory is compared where both have it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..case import Row, is_ours
from ..results import Result, read
from ..runner import make_console, narrow_table
from ..timing import Timing

# Medians of three runs one after the other, on a quiet AMD EPYC, differed by 3 % at most; each spread by 1 %.
RUNS = 1.03
# The factor and the bytes by which peak memory has to differ. Resident memory, on a CPU, counts libraries: two runs of
# one program differed by 7 % where it was large, and by 33 MiB where it was small.
MEMORY = {"cpu": (1.1, 40 * 2**20), "cuda": (1.05, 2**20)}
Key = tuple[str, str]


@dataclass(frozen=True)
class Change:
    """One variant of one case in both folders; ``case`` names op and parameters. ``figure`` is time or memory."""

    case: str
    variant: str
    figure: str
    before: str
    after: str
    ratio: float
    """After over before: above 1 is worse."""

    @property
    def worse(self) -> bool:
        return self.ratio > 1


@dataclass(frozen=True)
class Comparison:
    """``lost`` are rows of ours that have no figures any more, with the reason; ``only`` counts unmatched rows."""

    changes: list[Change]
    lost: list[str]
    same: int
    only: int

    @property
    def regressed(self) -> bool:
        """True if something of ours got worse. A peer may get worse with another version of PyTorch."""
        return any(change.worse and is_ours(change.variant) for change in self.changes) or bool(self.lost)


def print_comparison(before: Path, after: Path, force: bool = False) -> bool:
    """Print ``compare``; return True if something of ours got slower, larger or lost its figures."""
    found = compare(before, after, force)
    console = make_console()
    if found.changes:
        table = narrow_table("", ("case", "variant", "figure", "A", "B", "B / A"))
        for change in found.changes:
            cells = (change.case, change.variant, change.figure, change.before, change.after)
            table.add_row(*cells, f"[{'red' if change.worse else 'green'}]{change.ratio:.2f}x[/]")
        console.print(table)
    for line in found.lost:
        console.print(f"[red]no figures any more[/] {line}", highlight=False)
    worse = sum(change.worse for change in found.changes)
    better = len(found.changes) - worse
    console.print(f"{worse} worse, {better} better, {found.same} within the noise of both, {found.only} unmatched")
    return found.regressed


def compare(before: Path, after: Path, force: bool = False) -> Comparison:
    """Compare the result files of ``after`` with those of ``before``; the worst change comes first.

    Raises:
        OSError: a folder without result files.
        ValueError: results of different devices without ``force``, of another schema, or with nothing in common.
    """
    results = [_results(folder) for folder in (before, after)]
    old_device, new_device = (", ".join(sorted({result.device.slug for result in found})) for found in results)
    if old_device != new_device and not force:
        raise ValueError(f"{before} was measured on {old_device}, {after} on {new_device}; --force compares anyway")
    old, new = (_rows(found) for found in results)
    common = old.keys() & new.keys()
    if not common:
        raise ValueError(f"{before} and {after} have no case and variant in common")
    changes: list[Change] = []
    lost = [f"refused: {reason}" for result in results[1] for reason in result.refused]
    same = 0
    memory = MEMORY[results[1][0].device.type]
    for case, variant in sorted(common):
        a, b = old[case, variant], new[case, variant]
        if a.timing and b.timing:
            peers = [key for key in common if key[0] == case and key[1] != variant and not is_ours(key[1])]
            pairs = [(old[key].timing, new[key].timing) for key in peers]
            ratios = [after.median_ms / before.median_ms for before, after in pairs if before and after]
            # The ratio nearest to 1, or 1 where some are above and others below it or there are none.
            drift = max(min(ratios, default=1.0), 1.0) * min(max(ratios, default=1.0), 1.0)
            found = _changes(a.timing, b.timing, drift, memory)
            changes += [Change(case, variant, *change) for change in found]
            same += not found
        elif a.timing and is_ours(variant):
            lost.append(f"{case}, {variant}: {b.status}: {b.note}")
    changes.sort(key=lambda change: -change.ratio)
    return Comparison(changes, lost, same, len(old.keys() ^ new.keys()))


def _results(folder: Path) -> list[Result]:
    found = [read(path) for path in sorted(folder.glob("*.json")) if "cases" in json.loads(path.read_text())]
    if not found:
        raise FileNotFoundError(f"{folder} has no result files (<op>.json of the benchmarks)")
    return found


def _rows(results: list[Result]) -> dict[Key, Row]:
    """All rows but those that a budget left out."""
    return {
        (", ".join(f"{k}={v}" for k, v in case.items()), row.variant): row
        for result in results
        for case, rows in result.cases
        for row in rows
        if row.status != "not run"
    }


def _changes(a: Timing, b: Timing, drift: float, memory: tuple[float, int]) -> list[tuple[str, str, str, float]]:
    """Figure, before, after and ratio of what changed by more than the noise and the peers' ``drift``."""
    found = []
    slowest, fastest = a.p80_ms * max(drift, 1) * RUNS, a.p20_ms * min(drift, 1) / RUNS
    if b.p20_ms > slowest or b.p80_ms < fastest:
        old, new = (f"{t.median_ms:.4g} ms ({t.p20_ms:.4g} .. {t.p80_ms:.4g})" for t in (a, b))
        found.append(("time", old, new, b.median_ms / a.median_ms))
    if a.peak_bytes and b.peak_bytes:
        low, high = sorted((a.peak_bytes, b.peak_bytes))
        if high > memory[0] * low and high - low > memory[1]:
            old, new = (f"{peak / 2**20:.1f} MiB" for peak in (a.peak_bytes, b.peak_bytes))
            found.append(("peak memory", old, new, b.peak_bytes / a.peak_bytes))
    return found
