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
from matplotlib.ticker import NullLocator

from .case import Row
from .results import CaseRows, Result, read

MODELS = ("throughput", "split", "classes")
UPSAMPLE = ("upsample_argmax", "upsample_softmax", "upsample_cross_entropy")
COLOURS = {
    "ours": "#d62728",
    "ours compiled": "#8c1a1b",
    "reference": "#7f7f7f",
    "eager": "#7f7f7f",
    "eager float32": "#bcbd22",
    "eager AMP": "#bcbd22",
    "compile": "#1f77b4",
    "compile max-autotune": "#17becf",
    "SDPA default": "#1f77b4",
    "SDPA flash": "#17becf",
    "SDPA cuDNN": "#2ca02c",
    "SDPA efficient": "#9467bd",
    "xformers": "#e377c2",
    "flash-attn": "#ff7f0e",
    "SDPA math": "#8c564b",
    "peer": "#1f77b4",
    "peer max-autotune": "#17becf",
    "peer cuDNN": "#2ca02c",
    "OpenVINO": "#9467bd",
    "ONNX Runtime": "#ff7f0e",
    "encoder": "#4c78a8",
    "decoder": "#f58518",
    "upsample": "#54a24b",
}
YLABELS = {"ms": "ms", "MiB": "peak extra memory, MiB", "tflops": "TFLOP/s", "images_s": "images/s"}
XLABELS = {"patch": "patch size", "size": "pixels a side"}
# Parameters of a case that stand in titles.
WORDS = {"classes": "{} classes", "patch": "patch {}", "size": "{} px", "batch": "batch {}", "map": "{}", "dtype": "{}"}
MARKERS = {"t": "o", "s": "s", "b": "^", "l": "D"}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
}


class Panel(NamedTuple):
    """Lines of ``figure`` (see YLABELS) over the parameter ``axis``, one for each variant; TFLOP/s from zero."""

    cases: CaseRows
    axis: str
    figure: str
    title: str
    ceiling: float | None = None


def draw(folder: Path, ops: Sequence[str] = ("upsample", "attention", "training", *MODELS)) -> list[Path]:
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
            elif op == "upsample":
                figure = _draw_panels([_upsample_panels(result.cases) for result in results])
            else:
                figure = _draw_panels(panels_of[op](results[0]))
            written.append(_save(figure, results[0], folder / f"{op}.png"))
    return written


def _upsample_panels(cases: CaseRows) -> list[Panel]:
    """Time against each axis of the grid, and memory against classes."""
    panels = []
    for axis, figure in (("classes", "ms"), ("patch", "ms"), ("size", "ms"), ("classes", "MiB")):
        first, own = cases[0][0], _alike(cases, axis)
        title = f"{first['op']}, {first['pass']}\n{_words(first, axis)}"
        panels.append(Panel(own if len(own) > 1 else [], axis, figure, title))
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
    return [
        [
            Panel(_alike(result.cases, axis), axis, figure, f"training step of {first['model']}\n{_words(first, axis)}")
            for axis in ("patch", "classes")
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
    for family in sorted({_family(case) for case, _ in same}, key=lambda name: ("tsbl".find(name[0]), name)):
        own = [c for c in same if _family(c[0]) == family]
        panels.append(Panel(own, "patch", "images_s", f"{family.upper()}\n{title}"))
    return [[*panels, Panel(same, "tokens", "images_s", f"all\n{title}")]]


def _classes_panels(result: Result) -> list[list[Panel]]:
    case = result.cases[0][0]
    title = f"{case['variant']}, {_words(case, 'classes', 'patch')}, not compiled"
    return [[Panel(result.cases, "classes", "MiB", title)]]


def _draw_split(cases: CaseRows) -> Figure:
    """Stacked bars of encoder, decoder and upsampling; a panel for each variant, a bar for each model."""
    variants = list(dict.fromkeys(case["variant"] for case, _ in cases))
    figure, panels = plt.subplots(1, len(variants), figsize=(3.4 * len(variants), 3.8), squeeze=False)
    for variant, axes in zip(variants, panels[0], strict=True):
        bottoms: dict[str, float] = {}
        for case, rows in (c for c in cases if c[0]["variant"] == variant):
            axes.set_title(f"{variant}\n{_words(case, 'classes', 'patch')}, not compiled")
            for row in rows:
                if row.timing:
                    bottom, part = bottoms.get(row.variant, 0.0), case["part"]
                    axes.bar(row.variant, row.timing.median_ms, 0.6, bottom, color=COLOURS[part], label=part)
                    bottoms[row.variant] = bottom + row.timing.median_ms
    panels[0][0].set_ylabel("ms, parts measured one by one")
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
    for (variant, family), line in lines.items():
        x, low, middle, high = np.array(sorted(line)).T
        width, order = (2.2, 3) if variant == "ours" else (1.3, 2)
        style: dict[str, Any] = {"color": COLOURS.get(variant), "marker": MARKERS.get(family[:1], "o")}
        style |= {"linewidth": width, "zorder": order, "markersize": 4, "capsize": 2}
        axes.errorbar(x, middle, [middle - low, high - middle], label=variant, **style)
    axes.set(xlabel=XLABELS.get(panel.axis, panel.axis), ylabel=YLABELS[panel.figure], title=panel.title)
    if panel.figure == "tflops":
        axes.set_ylim(0, None)
    else:
        axes.set_yscale("log")
    if panel.ceiling:
        axes.axhline(panel.ceiling, color="black", linestyle=":", linewidth=1, label="matrix product, measured")
    ticks = sorted({point[0] for line in lines.values() for point in line})
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


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


def _save(figure: Figure, result: Result, path: Path) -> Path:
    """Write the figure with one legend below the panels and the device as its title."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    device = result.device
    versions = f"PyTorch {device.torch}, Triton {device.triton}, {(device.commit or 'unknown commit')[:10]}"
    where = device.name if device.type == "cuda" else f"{device.name}, {device.threads} threads"
    figure.suptitle(f"{where}\n{versions}\nmedian, bars from p20 to p80", fontsize=9)
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
