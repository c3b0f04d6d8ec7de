"""Curves of loss and mIoU of one or several runs, from their ``log.jsonl``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..io.atomic import RECORD, atomic_path
from .logs import LOG, read_log

_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "figure.constrained_layout.use": True,
}
_FEW = 20
"""Points up to which each is marked, and none are averaged."""
_SMOOTHING = 0.05
"""Share of the curve that a point of the running mean averages over."""


@dataclass(frozen=True)
class Curves:
    """Loss and mIoU of a run by step; of a step that was logged twice, the last."""

    name: str
    loss: dict[int, float]
    miou: dict[int, float]


def read_curves(run: Path) -> Curves:
    """Read the curves of a run's folder, or of its ``log.jsonl``.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: the log holds no step and no evaluation, or is damaged.
    """
    file = run / LOG if run.is_dir() else run
    if not file.is_file():
        raise FileNotFoundError(f"{run} is no run: it has no {LOG}")
    records = read_log(file)
    loss = {record["step"]: record["loss"] for record in records if record["kind"] == "step"}
    miou = {record["step"]: record["miou"] for record in records if record["kind"] == "evaluation"}
    finite = {step: value for step, value in loss.items() if value is not None}
    if not finite and not miou:
        raise ValueError(f"{file} holds no loss and no evaluation to draw yet")
    return Curves((run if run.is_dir() else run.parent).resolve().name, finite, miou)


def read_runs(runs: Sequence[Path]) -> list[Curves]:
    """Read the curves of each run; runs of the same name get a number."""
    curves = [read_curves(run) for run in runs]
    names = [run.name for run in curves]
    return [
        dataclasses.replace(run, name=f"{run.name} ({index})") if names.count(run.name) > 1 else run
        for index, run in enumerate(curves, 1)
    ]


def draw_curves(runs: Sequence[Curves], path: Path) -> Path:
    """Draw loss and mIoU side by side, a colour a run, to a PNG file.

    Raises:
        ValueError: no run, or a path that does not end in .png.
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    if not runs:
        raise ValueError("runs must name at least one run, got none")
    if path.suffix != ".png":
        raise ValueError(f"the plot must be a .png file, got {path}")
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), sharex=True)
        smooth = max(len(run.loss) for run in runs) > _FEW
        for index, run in enumerate(runs):
            colour = f"C{index % 10}"
            steps, losses = list(run.loss), list(run.loss.values())
            marker = {"marker": "o", "markersize": 3} if len(steps) <= _FEW else {}
            left.plot(
                steps, losses, color=colour, alpha=0.25 if smooth else 1, linewidth=0.8 if smooth else 1.5, **marker
            )
            left.plot(steps, running_mean(losses) if smooth else losses, color=colour, label=run.name)
            right.plot(list(run.miou), list(run.miou.values()), color=colour, marker="o", markersize=3, label=run.name)
            if run.miou:
                best = max(run.miou.items(), key=lambda point: point[1])
                right.annotate(f"{best[1]:.3f}", best, (0, 4), textcoords="offset points", ha="center", color=colour)
        left.set(xlabel="step", ylabel="loss", title=f"training loss{', and its running mean' if smooth else ''}")
        right.set(xlabel="step", ylabel="mIoU", title="mIoU of the evaluations, and the best of each run")
        right.set_ylim(0, min(1.05, max([0.01, *(1.25 * miou for run in runs for miou in run.miou.values())])))
        left.set_xlim(left=0)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        try:
            with atomic_path(path) as temporary:
                figure.savefig(temporary, dpi=110, metadata={RECORD: json.dumps([run.name for run in runs])})
        finally:
            plt.close(figure)
    return path


def drawn_from(path: Path) -> list[str] | None:
    """Return the names of the runs in a plot of ``draw_curves``, None for another file."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info[RECORD])
    except (OSError, KeyError, ValueError):
        return None


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the exponential mean over about a twentieth of the curve, corrected for the bias at its start."""
    decay = 1 - 1 / max(1.0, _SMOOTHING * len(values))
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means
