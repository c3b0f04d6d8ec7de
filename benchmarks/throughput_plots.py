"""Plots of whole models from their JSON alone: throughput against patch size and tokens, parts, memory of classes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from .cases import Row
from .plots import STYLE
from .results import Result, read

COLOURS = {
    "reference": "#7f7f7f",
    "peer": "#1f77b4",
    "peer max-autotune": "#17becf",
    "peer cuDNN": "#2ca02c",
    "ours": "#d62728",
}
PART_COLOURS = {"encoder": "#4c78a8", "decoder": "#f58518", "upsample": "#54a24b"}
MARKERS = {"t": "o", "s": "s", "b": "^", "l": "D"}
Cases = list[tuple[dict[str, Any], list[Row]]]


def draw(folder: Path) -> list[Path]:
    """Draw ``throughput.png``, ``split.png`` and ``classes.png`` beside the JSON that is there; return their paths."""
    written = []
    with plt.rc_context(STYLE):
        for op, drawn in (("throughput", _throughput), ("split", _split), ("classes", _classes)):
            path = folder / f"{op}.json"
            if path.exists():
                result = read(path)
                timed = [(case, rows) for case, rows in result.cases if any(row.timing for row in rows)]
                if timed:
                    figure = drawn(timed)
                    written.append(_save(figure, result, path.with_suffix(".png")))
    return written


def _throughput(cases: Cases) -> Any:
    """A panel of images/s against patch size for each size of model, and one against tokens for all of them.

    Only cases that differ from the first in variant alone are drawn.
    """
    first = cases[0][0]
    same = [
        c for c in cases if all(c[0][key] == first[key] for key in ("classes", "size", "batch", "dtype", "compiled"))
    ]
    families = list(dict.fromkeys(_family(case) for case, _ in same))
    families.sort(key=lambda family: "tsbl".find(family[0]))
    figure, panels = plt.subplots(1, len(families) + 1, figsize=(3.4 * (len(families) + 1), 3.9), sharey=True)
    title = f"{first['size']} px, batch {first['batch']}, {first['classes']} classes, {first['dtype']}"
    for family, panel in zip(families, panels, strict=False):
        mine = [(case, rows) for case, rows in same if _family(case) == family]
        _lines(panel, mine, "patch")
        panel.set(xlabel="patch size", title=f"{mine[0][0]['variant'].rsplit('_', 1)[0]}\n{title}")
        _lines(panels[-1], mine, "tokens", MARKERS.get(family[0], "x"))
    panels[0].set(ylabel="images/s", yscale="log")
    panels[-1].set(xlabel="tokens", title=f"{', '.join(f.upper() for f in families)}\n{title}")
    return figure


def _lines(panel: Axes, cases: Cases, axis: str, marker: str = "o") -> None:
    ticks = sorted({case[axis] for case, _ in cases})
    for name, colour in COLOURS.items():
        points = sorted(
            (case[axis], row.images_s, row.images_s * row.timing.median_ms / row.timing.p80_ms,
             row.images_s * row.timing.median_ms / row.timing.p20_ms)
            for case, rows in cases for row in rows if row.variant == name and row.timing and row.images_s
        )  # fmt: skip
        if points:
            x, y, low, high = zip(*points, strict=True)
            spread = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            panel.errorbar(x, y, spread, label=name, color=colour, marker=marker, markersize=4, capsize=2)
    panel.set_xscale("log", base=2)
    if axis == "patch":
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.set_minor_locator(NullLocator())


def _split(cases: Cases) -> Any:
    """Stacked bars of encoder, decoder and upsampling; a panel for each variant, a bar for each model."""
    variants = list(dict.fromkeys(case["variant"] for case, _ in cases))
    figure, panels = plt.subplots(1, len(variants), figsize=(1.2 + 3.0 * len(variants), 3.6), squeeze=False)
    for variant, panel in zip(variants, panels[0], strict=True):
        bottoms: dict[str, float] = {}
        for case, rows in (c for c in cases if c[0]["variant"] == variant):
            for row in rows:
                if row.timing:
                    time = row.timing.median_ms
                    bottom = bottoms.get(row.variant, 0.0)
                    panel.bar(row.variant, time, 0.6, bottom, color=PART_COLOURS[case["part"]], label=case["part"])
                    bottoms[row.variant] = bottom + time
        panel.set(title=f"{variant}, {case['size']} px, batch {case['batch']}\n{case['dtype']}, not compiled")
    panels[0][0].set_ylabel("ms, parts measured one by one")
    return figure


def _classes(cases: Cases) -> Any:
    """Peak extra memory against the number of classes."""
    figure, panel = plt.subplots(figsize=(4.6, 3.8))
    for name, colour in COLOURS.items():
        points = sorted(
            (case["classes"], row.timing.peak_bytes / 2**20)
            for case, rows in cases
            for row in rows
            if row.variant == name and row.timing and row.timing.peak_bytes is not None
        )
        if points:
            panel.plot(*zip(*points, strict=True), label=name, color=colour, marker="o", markersize=4)
    case = cases[0][0]
    panel.set(xscale="log", yscale="log", xlabel="classes", ylabel="peak extra memory, MiB")
    panel.xaxis.set_major_locator(FixedLocator(sorted({case["classes"] for case, _ in cases})))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_title(f"{case['variant']}, {case['size']} px, batch {case['batch']}, {case['dtype']}, not compiled")
    return figure


def _family(case: dict[str, Any]) -> str:
    """ "s" of "seg_s_mask_16", "s_dinov3" of "seg_s_dinov3_mask_16"."""
    return "_".join(word for word in case["variant"].split("_")[1:-1] if word not in ("mask", "linear"))


def _save(figure: Any, result: Result, path: Path) -> Path:
    """Write the figure with one legend below the panels and the device as its title."""
    handles: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in _unseen(panel, handles):
            handles[label] = handle
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    device = result.device
    where = device.name if device.type == "cuda" else f"{device.name}, {device.threads} threads"
    figure.suptitle(f"{where}, PyTorch {device.torch}; median, bars from p20 to p80", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _unseen(panel: Axes, seen: dict[str, Any]) -> Iterable[tuple[Any, str]]:
    return ((h, label) for h, label in zip(*panel.get_legend_handles_labels(), strict=True) if label not in seen)
