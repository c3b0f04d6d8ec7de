"""Whole models on the demo's photograph: reference, strong peer and ours, throughput against patch size.

``python -m segmenter_fast.benchmarks.throughput [VARIANT ...] [--out DIR] [--dtype D]`` writes ``throughput.json`` and
``throughput.png`` to the device's folder below DIR and prints the table that the README shows. A variant is refused
where our logits err more than twice as much as the peer's in the same dtype, or our labels are not their argmax.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from segmenter_fast import VARIANTS
from segmenter_fast.devices import choose_dtype

from .demo import SIDE, Comparison, run_demo
from .device import describe, resolve
from .plots import COLOURS, STYLE
from .results import write_json

DEFAULT = ("seg_t_mask_16", "seg_s_mask_16", "seg_b_mask_16", "seg_s_mask_32", "seg_s_mask_8")
MODELS = {"reference": "eager", "peer": "compile", "fast": "ours"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.throughput", description=__doc__)
    parser.add_argument("variants", nargs="*", default=DEFAULT, metavar="VARIANT", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    options = parser.parse_args(arguments)
    if unknown := set(options.variants) - set(VARIANTS):
        parser.error(f"unknown variants {', '.join(sorted(unknown))}; known are {', '.join(VARIANTS)}")
    device = resolve(options.device)
    dtype = choose_dtype(options.dtype, device)
    record = describe(device)
    rows: list[dict[str, Any]] = []
    refused = 0
    with tempfile.TemporaryDirectory() as overlays:
        for row in run_demo(Path(overlays), device, dtype, variants=options.variants):
            if not row.agrees:
                errors = f"error {row.error:.2g}, the peer's {row.peer_error:.2g}"
                print(f"refused: {row.variant}: {errors}; {row.own_labels:.2%} of the labels are the logits' argmax")
                refused += 1
                continue
            rows.append(_json_ready(row))
            content = {"device": asdict(record), "side": SIDE, "batch": 1, "rows": rows}
            path = write_json(content, options.out / record.slug / "throughput.json")
            print(f"{row.variant}: done", file=sys.stderr)
    if rows:
        plot(path)
        print(markdown(path))
    return 1 if refused else 0


def markdown(path: Path) -> str:
    """The README's table of a ``throughput.json``."""
    content = json.loads(path.read_text())
    device = content["device"]
    dtype = content["rows"][0]["dtype"]
    lines = [
        f"Images per second, one {content['side']} x {content['side']} photograph at a time, 150 classes, {dtype}, on "
        f"{device['name']} with {device['threads']} threads (PyTorch {device['torch']}):",
        "",
        "| | reference | peer | ours | over reference | over peer | error of the logits, peer / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        times = [row[name]["median_ms"] for name in MODELS]
        rates = " | ".join(f"{1000 / time:.2f}" for time in times)
        gains = " | ".join(f"{time / times[-1]:.1f}x" for time in times[:-1])
        errors = f"{row['peer_error']:.3f} / {row['error']:.3f}"
        lines.append(f"| `{row['variant']}` | {rates} | {gains} | {errors} |")
    return "\n".join(lines)


def plot(path: Path) -> Path:
    """Draw ``throughput.png`` beside a ``throughput.json``: images/s of the three models, a group a variant."""
    import matplotlib.pyplot as plt

    content = json.loads(path.read_text())
    rows = content["rows"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(1.6 + 1.3 * len(rows), 3.2))
        for index, (name, colour) in enumerate(MODELS.items()):
            rates = [1000 / row[name]["median_ms"] for row in rows]
            low, high = (
                [abs(1000 / row[name][p] - rate) for row, rate in zip(rows, rates, strict=True)]
                for p in ("p80_ms", "p20_ms")
            )
            at = [position + (index - 1) * 0.27 for position in range(len(rows))]
            bars = axes.bar(
                at, rates, 0.25, yerr=(low, high), color=COLOURS[colour], label=name if name != "fast" else "ours"
            )
            axes.bar_label(bars, fmt="%.3g", fontsize=7)
        axes.set_xticks(range(len(rows)), [row["variant"] for row in rows])
        axes.set_yscale("log")
        axes.set_ylabel("images/s")
        axes.set_title(f"{content['device']['name']}, {content['side']} px, batch 1; median, bars from p20 to p80")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path.with_suffix(".png"), dpi=110)
        plt.close(figure)
    return path.with_suffix(".png")


def _json_ready(row: Comparison) -> dict[str, Any]:
    fields = asdict(row) | {"dtype": str(row.dtype).removeprefix("torch.")}
    del fields["overlay"]
    return fields


if __name__ == "__main__":
    sys.exit(main())
