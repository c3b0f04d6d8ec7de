"""What got slower between two result folders: ``python -m segmenter_fast.benchmarks.compare A B``.

A and B are folders of one device, such as ``results/<device>`` of two checkouts. Rows are matched by op, parameters and
variant. A row differs only where the two spreads, p20 to p80, stay apart by more than runs of one program do, and by
more than all peers moved that took turns with it: they are the same program in A and in B, and tell what the machine
did in between. Peak memory is compared, too, where both have it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .cases import Row, is_ours
from .results import Result, read
from .timing import Timing

# Medians of three runs one after the other, on a quiet AMD EPYC, differed by 3 % at most; each spread by 1 %.
RUNS = 1.03
# By how much peak memory has to grow, and by how many bytes. Resident memory, on a CPU, is that of libraries, too: of
# two runs of one program it differed by 7 % where it was large, and by 33 MiB where it was small.
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
    """``lost`` are rows of ours without figures in B, and why; ``only`` counts rows of one folder alone."""

    changes: list[Change]
    lost: list[str]
    same: int
    only: int

    @property
    def regressed(self) -> bool:
        """Whether anything of ours got worse. A peer may: it came with another version of PyTorch."""
        return any(change.worse and is_ours(change.variant) for change in self.changes) or bool(self.lost)


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where something of ours got slower, larger or lost its figures; 2 where the folders cannot be compared."""
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument("--force", action="store_true", help="compare results of different devices")
    options = parser.parse_args(arguments)
    try:
        found = compare(options.before, options.after, options.force)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console.width = 140
    if found.changes:
        console.print(table(found.changes))
    for line in found.lost:
        console.print(f"[red]no figures any more[/] {line}", highlight=False)
    slower, faster = (sum(change.worse is worse for change in found.changes) for worse in (True, False))
    console.print(
        f"{slower} worse, {faster} better, {found.same} within the noise of both; {found.only} in one folder only"
    )
    return 1 if found.regressed else 0


def compare(before: Path, after: Path, force: bool = False) -> Comparison:
    """Hold the result files of ``after`` against those of ``before``.

    Raises:
        OSError: a folder without result files.
        ValueError: results of different devices without ``force``, of another schema, or with nothing in common.
    """
    results = [_results(folder) for folder in (before, after)]
    devices = [{result.device.slug for result in found} for found in results]
    if devices[0] != devices[1] and not force:
        names = [", ".join(sorted(slugs)) for slugs in devices]
        raise ValueError(
            f"{before} was measured on {names[0]}, {after} on {names[1]}; --force compares them all the same"
        )
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
        if a.timing is None or b.timing is None:
            if a.timing and is_ours(variant):
                lost.append(f"{case}, {variant}: {b.status}: {b.note}")
            continue
        peers = [key for key in common if key[0] == case and key[1] != variant and not is_ours(key[1])]
        found = list(_changes(case, variant, a.timing, b.timing, _drift(old, new, peers), memory))
        changes += found
        same += not found
    changes.sort(key=lambda change: -change.ratio)
    return Comparison(changes, lost, same, len(old.keys() ^ new.keys()))


def table(changes: list[Change]) -> Table:
    """The changes, the worst first."""
    result = Table()
    for heading in ("case", "variant", "figure", "A", "B", "B / A"):
        result.add_column(heading, overflow="fold")
    for change in changes:
        colour = "red" if change.worse else "green"
        cells = (change.case, change.variant, change.figure, change.before, change.after)
        result.add_row(*cells, f"[{colour}]{change.ratio:.2f}x[/]")
    return result


def _results(folder: Path) -> list[Result]:
    found = [read(path) for path in sorted(folder.glob("*.json")) if "cases" in json.loads(path.read_text())]
    if not found:
        raise FileNotFoundError(f"{folder} has no result files (<op>.json of the benchmarks)")
    return found


def _rows(results: list[Result]) -> dict[Key, Row]:
    """All but those that a budget had no time for, which are as if they had not been asked for."""
    return {
        (", ".join(f"{k}={v}" for k, v in case.items()), row.variant): row
        for result in results
        for case, rows in result.cases
        for row in rows
        if row.status != "not run"
    }


def _drift(old: dict[Key, Row], new: dict[Key, Row], peers: list[Key]) -> float:
    """What the machine did to all peers of a case: the ratio nearest to 1; 1 where they disagree or there are none."""
    pairs = [(old[key].timing, new[key].timing) for key in peers]
    ratios = [b.median_ms / a.median_ms for a, b in pairs if a and b] or [1.0]
    return max(min(ratios), 1.0) * min(max(ratios), 1.0)


def _changes(
    case: str, variant: str, a: Timing, b: Timing, drift: float, memory: tuple[float, int]
) -> Iterator[Change]:
    slowest, fastest = a.p80_ms * max(drift, 1) * RUNS, a.p20_ms * min(drift, 1) / RUNS
    if b.p20_ms > slowest or b.p80_ms < fastest:
        old, new = (f"{t.median_ms:.4g} ms ({t.p20_ms:.4g} .. {t.p80_ms:.4g})" for t in (a, b))
        yield Change(case, variant, "time", old, new, b.median_ms / a.median_ms)
    if a.peak_bytes and b.peak_bytes:
        low, high = sorted((a.peak_bytes, b.peak_bytes))
        share, least = memory
        if high > share * low and high - low > least:
            old, new = (f"{peak / 2**20:.1f} MiB" for peak in (a.peak_bytes, b.peak_bytes))
            yield Change(case, variant, "peak memory", old, new, b.peak_bytes / a.peak_bytes)


if __name__ == "__main__":
    sys.exit(main())
