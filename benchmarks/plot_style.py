"""Colours, markers and words of the plots."""

from __future__ import annotations

from typing import Any

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
TITLES = {
    "attention": "Attention, speed",
    "training": "Training step, time and memory",
    "throughput": "Inference, images per second",
    "classes": "Inference, memory by the number of classes",
    "split": "Inference, time of each part",
    "upsample": "Upsampling, time and memory",
    "merging": "Token merging, speed by the labels that are kept",
}
# Parameters of a case that stand in titles.
WORDS = {"classes": "{} classes", "patch": "patch {}", "size": "{} px", "batch": "batch {}", "map": "{}", "dtype": "{}"}
# Markers by size, for lines and in titles.
MARKERS = {"t": "o\u25cf", "s": "s\u25a0", "b": "^\u25b2", "l": "D\u25c6"}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
}
