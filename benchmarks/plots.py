"""Plots of result files, from the JSON alone: ``python -m segmenter_fast.benchmarks.plots results/<device>``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from .cases import Row
from .results import Result, read

UPSAMPLE = ("upsample_argmax", "upsample_softmax", "upsample_cross_entropy")
DRAWN = (*UPSAMPLE, "attention", "training")
COLOURS = {
    "ours": "#d62728",
    "ours compiled": "#8c1a1b",
    "eager": "#7f7f7f",
    "eager float32": "#bcbd22",
    "eager AMP": "#bcbd22",
    "compile": "#1f77b4",
    "SDPA default": "#1f77b4",
    "SDPA flash": "#17becf",
    "SDPA cuDNN": "#2ca02c",
    "SDPA efficient": "#9467bd",
    "SDPA math": "#8c564b",
    "xformers": "#e377c2",
    "flash-attn": "#ff7f0e",
}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
}
Value = Callable[[Row], tuple[float, float, float] | None]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.plots", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder with <op>.json files")
    from . import throughput_plots  # has this module's style

    folder = parser.parse_args(arguments).folder
    written = draw(folder) + throughput_plots.draw(folder)
    for path in written:
        print(path)
    return 0 if written else 1


def draw(folder: Path, ops: tuple[str, ...] = DRAWN) -> list[Path]:
    """Draw ``upsample.png``, ``attention.png`` and ``training.png``, as far as ``ops`` and the result files beside
    which they go call for them; return their paths."""
    results = {path.stem: read(path) for path in sorted(folder.glob("*.json")) if path.stem in ops}
    written = []
    with plt.rc_context(STYLE):
        if upsample := [results[op] for op in UPSAMPLE if op in results]:
            written.append(_upsample(upsample, folder / "upsample.png"))
        if "attention" in results:
            written.append(_attention(results["attention"], folder / "attention.png"))
        if "training" in results:
            written.append(_training(results["training"], folder / "training.png"))
    return written


def _upsample(results: list[Result], path: Path) -> Path:
    """One row of panels for each op: time against each axis of the grid, and memory against classes."""
    figure, panels = plt.subplots(len(results), 4, figsize=(15, 3.4 * len(results)), squeeze=False)
    for result, row in zip(results, panels, strict=True):
        first = result.cases[0][0]
        for panel, axis, label in zip(
            row, ("classes", "patch", "size"), ("classes", "patch size", "pixels a side"), strict=False
        ):
            _lines(panel, result, axis, first, _milliseconds)
            panel.set(xlabel=label, ylabel="ms", yscale="log", title=_title(first, axis))
            panel.set_visible(len({case[axis] for case, _ in result.cases}) > 1)
        _lines(row[3], result, "classes", first, _mebibytes)
        row[3].set(xlabel="classes", ylabel="peak extra memory, MiB", yscale="log", title=_title(first, "classes"))
    return _save(figure, panels[0][0], results[0], path)


def _attention(result: Result, path: Path) -> Path:
    """TFLOP/s against tokens: a row for each kind of batch and dtype, forward beside backward."""
    kinds = list(dict.fromkeys((case["batch"] == 1, case["dtype"]) for case, _ in result.cases))
    figure, panels = plt.subplots(len(kinds), 2, figsize=(11, 3.4 * len(kinds)), squeeze=False)
    for (single, dtype), row in zip(kinds, panels, strict=True):
        for panel, pass_ in zip(row, ("forward", "backward"), strict=True):
            same = [c for c, _ in result.cases if (c["batch"] == 1, c["dtype"], c["pass"]) == (single, dtype, pass_)]
            if not same:
                panel.set_visible(False)
                continue
            ignored = ("tokens", "batch") if not single else ("tokens",)
            _lines(panel, result, "tokens", same[0], _tflops, ignored)
            batch = "batch 1" if single else "batches that fill the device"
            panel.set(xlabel="tokens", ylabel="TFLOP/s", ylim=(0, None), title=f"{pass_}, {dtype}, {batch}")
            if rate := result.ceilings.matmul_tflops.get(dtype):
                panel.axhline(rate, color="black", linestyle=":", linewidth=1, label="matrix product, measured")
    return _save(figure, panels[0][0], result, path)


def _training(result: Result, path: Path) -> Path:
    """Time of a step and its memory, against the patch size and against the classes."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.8))
    first = result.cases[0][0]
    for column, (axis, label) in zip(panels.T, (("patch", "patch size"), ("classes", "classes")), strict=True):
        _lines(column[0], result, axis, first, _milliseconds)
        _lines(column[1], result, axis, first, _mebibytes)
        fixed = f"{first['classes']} classes" if axis == "patch" else f"patch {first['patch']}"
        model = f"{first['model']}, {fixed}, {first['size']} px, batch {first['batch']}, {first['dtype']}"
        column[0].set(xlabel=label, ylabel="training step, ms", yscale="log", title=model)
        column[1].set(xlabel=label, ylabel="peak extra memory, MiB", yscale="log", title=model)
    return _save(figure, panels[0][0], result, path)


def _lines(
    panel: Axes, result: Result, axis: str, first: dict[str, Any], value: Value, ignored: tuple[str, ...] = ()
) -> None:
    """One line for each variant over the cases that differ from ``first`` in ``axis`` alone (or in ``ignored``)."""
    free = {axis, *ignored}
    points: dict[str, list[tuple[float, tuple[float, float, float]]]] = {}
    for case, rows in result.cases:
        if any(case[key] != first[key] for key in first if key not in free):
            continue
        for row in rows:
            figures = value(row)
            if figures is not None:
                points.setdefault(row.variant, []).append((case[axis], figures))
    ticks = sorted({x for line in points.values() for x, _ in line})
    for variant, line in points.items():
        line.sort()
        x, y = [x for x, _ in line], [y for _, (_, y, _) in line]
        spread = [[y - low for _, (low, y, _) in line], [high - y for _, (_, y, high) in line]]
        ours = variant == "ours"
        panel.errorbar(
            x,
            y,
            spread,
            label=variant,
            color=COLOURS.get(variant),
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=2.2 if ours else 1.3,
            zorder=3 if ours else 2,
        )
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _milliseconds(row: Row) -> tuple[float, float, float] | None:
    return (row.timing.p20_ms, row.timing.median_ms, row.timing.p80_ms) if row.timing else None


def _mebibytes(row: Row) -> tuple[float, float, float] | None:
    if row.timing is None or not row.timing.peak_bytes:
        return None
    return (row.timing.peak_bytes / 2**20,) * 3


def _tflops(row: Row) -> tuple[float, float, float] | None:
    if row.timing is None or row.tflops is None:
        return None
    work = row.tflops * row.timing.median_ms
    return work / row.timing.p80_ms, row.tflops, work / row.timing.p20_ms


def _title(first: dict[str, Any], axis: str) -> str:
    fixed = {"classes": "{} classes", "patch": "patch {}", "size": "{} px", "batch": "batch {}"}
    words = [text.format(first[key]) for key, text in fixed.items() if key != axis]
    return f"{first['op']}, {first['pass']}\n{', '.join(words)}, {first['map']}, {first['dtype']}"


def _save(figure: Any, panel: Axes, result: Result, path: Path) -> Path:
    """Write the figure with one legend below the panels and the device as its title."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 9), frameon=False)
    commit = (result.device.commit or "unknown commit")[:10]
    versions = f"PyTorch {result.device.torch}, Triton {result.device.triton}, {commit}"
    figure.suptitle(f"{result.device.name}, {versions}\nmedian, bars from p20 to p80", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())
