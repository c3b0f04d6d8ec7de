"""The README's measured block, from the committed JSON: ``python -m segmenter_fast.benchmarks.readme`` rewrites it.

It stands between ``<!-- measured -->`` and ``<!-- /measured -->``. With ``--check`` nothing is written, and the exit
code is 1 where README and JSON differ.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from .board import compared, memory, pair, speeds
from .cases import OURS, Row
from .models import in_words
from .results import Result, read

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
# What of the ops' files stands in the README: label, file, what the case's parameters must be.
OPS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("`upsample_argmax`, smooth maps", "upsample_argmax", {"classes": 150, "patch": 16, "map": "smooth"}),
    ("`upsample_argmax`, noise", "upsample_argmax", {"classes": 150, "patch": 16, "map": "noise"}),
    (
        "`upsample_cross_entropy`, forward and backward",
        "upsample_cross_entropy",
        {"classes": 150, "patch": 16, "map": "smooth", "pass": "forward+backward"},
    ),
    ("`upsample_softmax`", "upsample_softmax", {"classes": 150, "patch": 16, "map": "smooth", "pass": "forward"}),
    *(
        ("`attention`", "attention", {"tokens": 1025, "pass": "forward", "dtype": dtype})
        for dtype in ("float32", "bfloat16")
    ),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where they differ")
    options = parser.parse_args(arguments)
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = rewritten(before, ROOT / "benchmarks" / "results")
    if before == after:
        return 0
    if options.check:
        print("README.md differs from benchmarks/results; run python -m segmenter_fast.benchmarks.readme")
        return 1
    readme.write_text(after)
    return 0


def rewritten(readme: str, results: Path) -> str:
    """The README with the block that the result folders call for.

    Raises:
        ValueError: no block, or more than one.
    """
    block = "\n".join(part for folder in sorted(results.iterdir()) for part in _folder(folder))
    text, count = BLOCK.subn(lambda found: f"{found[1]}\n{block}\n{found[2]}", readme)
    if count != 1:
        raise ValueError(f"README.md must have one block <!-- measured --> ... <!-- /measured -->, found {count}")
    return text


def _folder(folder: Path) -> list[str]:
    """What one device measured, as far as its files are there."""
    parts = []
    models = folder / "throughput.json"
    if models.exists():
        parts += [models_table(read(models)), ""]
        pictures = {
            "throughput": "Throughput against patch size and against tokens",
            "split": "Time of encoder, decoder and upsampling",
            "classes": "Peak memory against classes",
        }
        for name, caption in pictures.items():
            if (folder / f"{name}.png").exists() and (folder / f"{name}.json").exists():
                parts += [f"![{caption}](benchmarks/results/{folder.name}/{name}.png)", ""]
    rows = [line for label, op, wanted in OPS if (line := _op_line(label, folder / f"{op}.json", wanted))]
    if rows:
        result = read(next(folder / f"{op}.json" for _, op, _ in OPS if (folder / f"{op}.json").exists()))
        parts += [
            f"The ops on {_where(result)} (150 classes, 32 x 32 patches to 512 x 512; attention: 12 heads of 64):",
            "",
            "| op | eager | `torch.compile` | ours | over eager | peak MiB, eager / ours |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    return parts


def models_table(result: Result) -> str:
    """The table of a ``throughput.json``: one line a case, figures or the reason why there are none."""
    shared = {key: value for key, value in result.cases[0][0].items() if all(c[key] == value for c, _ in result.cases)}
    lines = [
        f"Images per second on {_where(result)} (PyTorch {result.device.torch}), {in_words(shared)}, a photograph:",
        "",
        "| | tokens | reference | peer | ours | over reference | over peer | share of peak | MiB, reference / ours "
        "| error of the logits, peer / ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, rows in sorted(result.cases, key=lambda found: _order(found[0])):
        reference, peer, ours = compared(rows)
        own = in_words({key: value for key, value in case.items() if key not in shared})
        name = f"`{case['variant']}`" + (f", {own}" if own else "")
        errors = pair(("" if row.error is None else f"{row.error:.2g}" for row in (peer, ours)), " / ")
        cells = (name, str(case["tokens"]), *speeds(rows), memory((reference, ours), " / "), errors)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _op_line(label: str, path: Path, wanted: dict[str, Any]) -> str | None:
    if not path.exists():
        return None
    result = read(path)
    for case, rows in result.cases:
        # A dtype without a ceiling is one that the device emulates, where every ratio is large.
        if all(case[key] == value for key, value in wanted.items()) and case["dtype"] in result.ceilings.matmul_tflops:
            by_name = {row.variant: row for row in rows}
            eager, ours = by_name["eager"], by_name[OURS]
            if not (eager.timing and ours.timing):
                return None
            compiled = by_name.get("compile")
            times = [_milliseconds(row) for row in (eager, compiled, ours)]
            gain = eager.timing.median_ms / ours.timing.median_ms
            name = f"{label}, batch {case['batch']}, {case['dtype']}"
            return f"| {name} | {' | '.join(times)} | {gain:.1f}x | {memory((eager, ours), ' / ')} |"
    return None


def _order(case: dict[str, Any]) -> tuple[Any, ...]:
    size = "tsbl".find(case["variant"].split("_")[1])
    return case["dtype"], case["batch"], case["size"], case["classes"], size, case["patch"]


def _where(result: Result) -> str:
    device = result.device
    return device.name if device.type == "cuda" else f"{device.name} with {device.threads} threads"


def _milliseconds(row: Row | None) -> str:
    if row is None or row.timing is None:
        return ""
    time = row.timing.median_ms
    return f"{time:.0f} ms" if time >= 100 else f"{time:.3g} ms"


if __name__ == "__main__":
    sys.exit(main())
