"""Plots of result files, from the JSON alone: ``python -m segmenter_fast.benchmarks.plots results/<device>``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from .case import Row
from .plot_style import COLOURS, MARKERS, STYLE, TITLES, WORDS, XLABELS, YLABELS
from .results import CaseRows, Result, read

MODELS = ("throughput", "split", "classes")
UPSAMPLE = ("upsample_argmax", "upsample_softmax", "upsample_cross_entropy")


class Panel(NamedTuple):
    """Lines of ``figure`` (see YLABELS) over the parameter ``axis``, one for each variant; TFLOP/s from zero.

    Where the axis has one value only, bars.
    """

    cases: CaseRows
    axis: str
    figure: str
    title: str
    ceiling: float | None = None


def draw(folder: Path, ops: Sequence[str] = ("upsample", "attention", "training", "merging", *MODELS)) -> list[Path]:
    """Draw ``<op>.png`` from the JSON files of ``folder``, as far as they have figures; return the paths."""
    panels_of: dict[str, Callable[[Result], list[list[Panel]]]] = {
        "attention": _attention_panels,
        "training": _training_panels,
        "throughput": _throughput_panels,
        "classes": _classes_panels,
    }
    written = []
    for op in ops:
        paths = [folder / f"{name}.json" for name in (UPSAMPLE if op == "upsample" else (op,))]
        results = [read(path) for path in paths if path.exists()]
        for result in results:
            result.cases = [(case, rows) for case, rows in result.cases if any(row.timing for row in rows)]
        results = [result for result in results if result.cases]
        if not results:
            continue
        with plt.rc_context(STYLE):
            if op == "split":
                figure = _draw_split(results[0].cases)
            elif op == "merging":
                figure = _draw_merging(results[0].cases)
            elif op == "upsample":
                rows = [_upsample_panels(result.cases) for result in results]
                used = [any(panel.cases for panel in column) for column in zip(*rows, strict=True)]
                figure = _draw_panels([[*itertools.compress(row, used)] for row in rows])
            else:
                figure = _draw_panels(panels_of[op](results[0]))
            written.append(_save(figure, TITLES[op], results[0], folder / f"{op}.png"))
    return written


def _upsample_panels(cases: CaseRows) -> list[Panel]:
    """Time against each axis of the grid that has several values, or the first, and memory against classes."""
    panels = []
    for axis, figure in (("classes", "ms"), ("patch", "ms"), ("size", "ms"), ("classes", "MiB")):
        first, own = cases[0][0], _alike(cases, axis)
        title = f"{first['op']}, {first['pass']}\n{_words(first, axis)}"
        panels.append(Panel(own if len(own) > 1 or axis == "classes" else [], axis, figure, title))
    return panels


def _attention_panels(result: Result) -> list[list[Panel]]:
    """TFLOP/s against tokens: a row for each kind of batch and dtype, forward beside backward."""
    rows: list[list[Panel]] = []
    for single, dtype in dict.fromkeys((case["batch"] == 1, case["dtype"]) for case, _ in result.cases):
        ceiling = result.ceilings.matmul_tflops.get(dtype)
        batch = "batch 1" if single else "batches that fill the device"
        rows.append([])
        for pass_ in ("forward", "backward"):
            wanted = single, dtype, pass_
            cases = [c for c in result.cases if (c[0]["batch"] == 1, c[0]["dtype"], c[0]["pass"]) == wanted]
            rows[-1].append(Panel(cases, "tokens", "tflops", f"{pass_}, {dtype}, {batch}", ceiling))
    return rows


def _training_panels(result: Result) -> list[list[Panel]]:
    """Time of a step and its memory, against the patch size and against the classes."""
    first = result.cases[0][0]
    axes = [(axis, _alike(result.cases, axis)) for axis in ("patch", "classes")]
    axes = [(axis, cases) for axis, cases in axes if len(cases) > 1] or axes[:1]
    return [
        [
            Panel(cases, axis, figure, f"training step of {first['model']}\n{_words(first, axis)}")
            for axis, cases in axes
        ]
        for figure in ("ms", "MiB")
    ]


def _throughput_panels(result: Result) -> list[list[Panel]]:
    """Images/s against patch size for each size of model, and against tokens for all of them.

    Only cases that differ from the first in variant alone are drawn.
    """
    same = _alike(result.cases, "variant", "patch", "tokens")
    title = _words(result.cases[0][0], "patch")
    panels = []
    families = sorted({_family(case) for case, _ in same}, key=_order)
    for family in families:
        own = [c for c in same if _family(c[0]) == family]
        panels.append(Panel(own, "patch", "images_s", f"Segmenter {family.upper()}\n{title}"))
    if len(families) == 1:
        return [panels]
    signs = ", ".join(f"{family.upper()} {MARKERS.get(family[:1], '')[1:]}" for family in families)
    return [[*panels, Panel(same, "tokens", "images_s", f"all: {signs}\n{title}")]]


def _classes_panels(result: Result) -> list[list[Panel]]:
    case = result.cases[0][0]
    title = f"{case['variant']}, {_words(case, 'classes', 'patch')}, not compiled"
    return [[Panel(result.cases, "classes", "MiB", title)]]


def _draw_split(cases: CaseRows) -> Figure:
    """Stacked bars of encoder, decoder and upsampling; a panel for each variant, a bar for each model."""
    variants = sorted({case["variant"] for case, _ in cases}, key=lambda name: _order(_family({"variant": name})))
    figure, panels = plt.subplots(1, len(variants), figsize=(3.4 * len(variants), 3.8), squeeze=False)
    for variant, axes in zip(variants, panels[0], strict=True):
        bottoms: dict[str, float] = {}
        for case, rows in (c for c in cases if c[0]["variant"] == variant):
            axes.set_title(f"{variant}\n{_words(case, 'classes', 'patch')}, not compiled")
            for row in rows:
                if row.timing:
                    bottom, part = bottoms.get(row.variant, 0.0), case["part"]
                    low, high = row.timing.median_ms - row.timing.p20_ms, row.timing.p80_ms - row.timing.median_ms
                    style: dict[str, Any] = {"color": COLOURS[part], "label": part, "capsize": 3}
                    axes.bar(row.variant, row.timing.median_ms, 0.6, bottom, yerr=[[low], [high]], **style)
                    bottoms[row.variant] = bottom + row.timing.median_ms
        axes.set_ylabel("ms, parts measured one by one")
        axes.grid(axis="x", visible=False)
    return figure


def _draw_merging(cases: CaseRows) -> Figure:
    """Images/s against the share of labels that a schedule keeps; a panel for each case with labels."""
    real = [(case, rows) for case, rows in cases if any(row.labels is not None for row in rows)] or cases[:1]
    figure, panels = plt.subplots(1, len(real), figsize=(5.2 * len(real), 4.2), squeeze=False)
    for (case, rows), axes in zip(real, panels[0], strict=True):
        for row in rows:
            if row.labels is not None and (found := _values(row, "images_s")):
                low, middle, high = found
                name, x = row.variant.removeprefix("ours "), 100 * row.labels
                style: dict[str, Any] = {
                    "fmt": "o",
                    "capsize": 2,
                    "color": COLOURS["encoder" if "%" in name else "ours"],
                }
                axes.errorbar(x, middle, [[middle - low], [high - middle]], **style)
                axes.annotate(name, (x, middle), (6, 4), textcoords="offset points", fontsize=8)
        title = f"{case['variant']}, {_words(case, 'classes')}\nreal weights, photographs"
        axes.set(xlabel="labels of the exact model in float32 that are kept, %", ylabel="images/s", title=title)
        axes.margins(0.15)
    return figure


def _alike(cases: CaseRows, *free: str) -> CaseRows:
    """The cases that differ from the first in the ``free`` parameters alone."""
    first = cases[0][0]
    return [c for c in cases if all(c[0][key] == value for key, value in first.items() if key not in free)]


def _words(case: dict[str, Any], *left_out: str) -> str:
    return ", ".join(text.format(case[key]) for key, text in WORDS.items() if key in case and key not in left_out)


def _draw_panels(rows: list[list[Panel]]) -> Figure:
    """Draw rows of panels; one without cases stays empty."""
    columns = max(map(len, rows))
    size = (3.7 * columns + 0.6, 3.4 * len(rows) + 0.5)
    figure, grid = plt.subplots(len(rows), columns, figsize=size, squeeze=False, sharey=len(rows) == 1)
    for axes, panel in zip(grid.flat, itertools.chain(*rows), strict=True):
        axes.set_visible(bool(panel.cases))
        if panel.cases:
            _draw_panel(axes, panel)
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    lines: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for case, rows in panel.cases:
        for row in rows:
            if found := _values(row, panel.figure):
                lines.setdefault((row.variant, _family(case)), []).append((case[panel.axis], *found))
    ticks = sorted({point[0] for line in lines.values() for point in line})
    if len(ticks) == 1:
        _draw_bars(axes, panel, {variant: line[0][1:] for (variant, _), line in lines.items()}, ticks[0])
        return
    for (variant, family), line in lines.items():
        x, low, middle, high = np.array(sorted(line)).T
        width, order = (2.2, 3) if variant == "ours" else (1.3, 2)
        style: dict[str, Any] = {"color": COLOURS.get(variant), "marker": MARKERS.get(family[:1], "o")[0]}
        style |= {"linewidth": width, "zorder": order, "markersize": 4, "capsize": 2}
        axes.errorbar(x, middle, [middle - low, high - middle], label=variant, **style)
    axes.set(xlabel=XLABELS.get(panel.axis, panel.axis), ylabel=YLABELS[panel.figure], title=panel.title)
    if panel.ceiling:
        axes.axhline(panel.ceiling, color="black", linestyle=":", linewidth=1, label="matrix product, measured")
    if panel.figure == "tflops":
        axes.set_ylim(0, None)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    crowded = min(np.diff(np.log(ticks))) < 0.1 * np.log(ticks[-1] / ticks[0])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45 if crowded else 0)


def _draw_bars(axes: Axes, panel: Panel, values: dict[str, tuple[float, ...]], tick: float) -> None:
    """Draw one bar, low, middle and high value, for each variant."""
    for variant, (low, middle, high) in values.items():
        spread = [[middle - low], [high - middle]] if low < high else None
        drawn = axes.bar(variant, middle, 0.6, yerr=spread, color=COLOURS.get(variant), label=variant, capsize=3)
        axes.bar_label(drawn, [f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"], padding=2)
    name = XLABELS.get(panel.axis, panel.axis)
    axes.set(xlabel=f"{name}: {tick:g}", ylabel=YLABELS[panel.figure], title=panel.title, xticks=[])
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)


def _values(row: Row, figure: str) -> tuple[float, float, float] | None:
    """Low, middle and high value of ms, MiB, tflops or images_s; None where the row has none."""
    timing = row.timing
    if timing is None:
        return None
    if figure == "ms":
        return timing.p20_ms, timing.median_ms, timing.p80_ms
    if figure == "MiB":
        return (timing.peak_bytes / 2**20,) * 3 if timing.peak_bytes else None
    rate = getattr(row, figure)
    return rate and (rate * timing.median_ms / timing.p80_ms, rate, rate * timing.median_ms / timing.p20_ms)


def _family(case: dict[str, Any]) -> str:
    """ "s" of "seg_s_mask_16", "s_dinov3" of "seg_s_dinov3_mask_16"; nothing for other cases."""
    words = case.get("variant", "").split("_")[1:-1]
    return "_".join(word for word in words if word not in ("mask", "linear"))


def _order(family: str) -> tuple[int, str]:
    """Sort families from small to large."""
    return "tsbl".find(family[:1]), family


def _save(figure: Figure, title: str, result: Result, path: Path) -> Path:
    """Write the figure with one legend below the panels, its title and the device."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = max(min(len(handles), int(figure.get_figwidth() / 1.5), 6), 1)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
    device = result.device
    versions = f"PyTorch {device.torch}, Triton {device.triton}, {(device.commit or 'unknown commit')[:10]}"
    where = device.name if device.type == "cuda" else f"{device.name}, {device.threads} threads"
    figure.suptitle(f"{title}\n{where}\n{versions}\nmedian, error bars from p20 to p80", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(folder: Annotated[Path, typer.Argument(help="Folder of a device's results.")]) -> None:
    """Draw the plots of the JSON files of a folder, and print their paths. Exit code 1: there was nothing to draw."""
    written = draw(folder)
    print(*written, sep="\n")
    raise typer.Exit(not written)


if __name__ == "__main__":
    typer.run(main)
