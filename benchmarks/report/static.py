"""Static bounds of the kernels before and after: ``python -m segmenter_fast.benchmarks.report.static`` counts again.

It writes ``results/static/after.json``, the plot and the table of benchmarks/README.md; ``before.json`` stays. All of
them are counts of machine code (``kernels/problems``). No kernel runs, and a static bound is not a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..plots import COLOURS, STYLE
from ..results import RESULTS
from ..runner import run_command
from .tables import README, rewritten

FOLDER = RESULTS / "static"
NOTE = "Static bound, not a time: H100, every issue slot used, no cache missed"

Costs = dict[str, dict[str, Any]]  # by problem


def read(path: Path) -> Costs:
    return {problem["problem"]: problem for problem in json.loads(path.read_text())}


def issue_us(problem: dict[str, Any]) -> float:
    """The issue-bound time of a problem, all of its launches together."""
    return sum(one["us"]["issue"] for one in problem["launches"])


def number(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def table(before: Costs, after: Costs) -> str:
    """A line for each problem; registers and warps are those of the launch that takes longest."""
    lines = [
        f"{NOTE}. Microseconds; before -> after.",
        "",
        "| problem | issue-bound | slowest pipe | floor | registers | warps of an SM |",
        "|---|---|---|---|---|---|",
    ]
    for name, problem in after.items():
        both = [one[name] for one in (before, after) if name in one]
        longest = [max(one["launches"], key=lambda launch: launch["us"]["issue"]) for one in both]
        slowest = [sum(max(launch["us"].values()) for launch in one["launches"]) for one in both]
        floor, kind = max((us, kind) for kind, us in problem["floor_us"].items())
        cells = (
            " -> ".join(number(issue_us(one)) for one in both),
            " -> ".join(number(us) for us in slowest),
            f"{number(floor)} ({kind})",
            " -> ".join(str(launch["registers"]) for launch in longest),
            " -> ".join(str(launch["warps_sm"]) for launch in longest),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(before: Costs, after: Costs, path: Path) -> None:
    """Bars of both issue-bound times, and a mark at the floor of each problem."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.0, 0.45 * len(after) + 1.4))
        series = (("before", before, COLOURS["reference"]), ("after", after, COLOURS["ours"]))
        for place, (label, costs, colour) in enumerate(series):
            rows = [(number, issue_us(costs[name])) for number, name in enumerate(after) if name in costs]
            axes.barh([row + 0.38 * place for row, _ in rows], [us for _, us in rows], 0.36, label=label, color=colour)
        floors = [max(problem["floor_us"].values()) for problem in after.values()]
        places = [row + 0.19 for row in range(len(after))]
        axes.scatter(floors, places, marker="|", s=160, color="black", zorder=3, label="floor: the least work")
        axes.set(xscale="log", xlabel="us", title=NOTE, yticks=places, yticklabels=list(after))
        axes.invert_yaxis()
        axes.legend(frameon=False)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def main() -> None:
    """Count the kernels again, and write the JSON, the plot and the table of the page."""
    from segmenter_fast.kernels.problems import measure  # needs Triton

    (FOLDER / "after.json").write_text(json.dumps(measure(), indent=1) + "\n")
    before, after = (read(FOLDER / f"{name}.json") for name in ("before", "after"))
    draw(before, after, FOLDER / "bounds.png")
    README.write_text(rewritten(README.read_text(), "static", table(before, after)))


if __name__ == "__main__":
    run_command(main)
