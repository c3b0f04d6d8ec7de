"""Static bounds of the kernels: ``python -m segmenter_fast.benchmarks.report.static`` counts them again.

It writes ``results/static/bounds.json`` and the table of benchmarks/README.md. All of them are counts of machine code
(``kernels/problems``). No kernel runs, and a static bound is not a time.
"""

from __future__ import annotations

import json
from typing import Any

from ..results import RESULTS
from ..runner import run_command
from .tables import README, make_table, rewritten

BOUNDS = RESULTS / "static" / "bounds.json"
TITLE = "Static bound, not a time: H100, every issue slot used, no cache missed. Microseconds:"
HEADER = "| problem | issue-bound | slowest pipe | floor | registers | warps of an SM |"


def number(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def table(problems: list[dict[str, Any]]) -> str:
    """A line for each problem; registers and warps are those of the launch that takes longest."""
    rows = []
    for problem in problems:
        launches, (floor, kind) = problem["launches"], max((us, kind) for kind, us in problem["floor_us"].items())
        longest = max(launches, key=lambda launch: launch["us"]["issue"])
        issue = sum(launch["us"]["issue"] for launch in launches)
        slowest = sum(max(launch["us"].values()) for launch in launches)
        times = number(issue), number(slowest), f"{number(floor)} ({kind})"
        rows.append((problem["problem"], *times, str(longest["registers"]), str(longest["warps_sm"])))
    return make_table(TITLE, HEADER, rows)


def main() -> None:
    """Count the kernels again, and write the JSON and the table of the page."""
    from segmenter_fast.kernels.problems import measure  # needs Triton

    problems = measure()
    BOUNDS.write_text(json.dumps(problems, indent=1) + "\n")
    README.write_text(rewritten(README.read_text(), "static", table(problems)))


if __name__ == "__main__":
    run_command(main)
