"""How near each op comes to what the device could do, from result files alone.

``python -m segmenter_fast.benchmarks.roofline`` writes the tables of all committed results into the README beside it,
between ``<!-- roofline -->`` and ``<!-- /roofline -->``; with a folder as argument it prints that folder's table.
Attainable is the longer of two times: the least bytes at the measured copy bandwidth, the counted FLOPs at the measured
matrix-product rate. Exponentials are in neither, so that ops which are made of them cannot come near.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .cases import OURS, Row
from .ops import OPS
from .results import Result, read
from .run import RESULTS

README = Path(__file__).resolve().parent / "README.md"
BLOCK = re.compile(r"(<!-- roofline -->\n).*?(<!-- /roofline -->)", re.DOTALL)


def rewritten(readme: str, results: Path) -> str:
    """The README with the tables of every folder below ``results`` that has a result file of an op.

    Raises:
        ValueError: no block for them, or more than one.
    """
    folders = [path for path in sorted(results.iterdir()) if any((path / f"{op}.json").exists() for op in OPS)]
    tables = "\n\n".join(markdown(folder) for folder in folders)
    text, count = BLOCK.subn(lambda found: f"{found[1]}\n{tables}\n\n{found[2]}", readme)
    if count != 1:
        raise ValueError(f"README.md must have one block <!-- roofline --> ... <!-- /roofline -->, found {count}")
    return text


def markdown(folder: Path) -> str:
    """A row for the first case of each op, pass and dtype in ``folder``.

    Raises:
        OSError: no result file of an op.
    """
    paths = [folder / f"{op}.json" for op in OPS if (folder / f"{op}.json").exists()]
    if not paths:
        raise FileNotFoundError(f"{folder} has no result file of {', '.join(OPS)}")
    results = [read(path) for path in paths]
    device, ceilings = results[0].device, results[0].ceilings
    rates = ", ".join(f"{rate:.2f} TFLOP/s {name}" for name, rate in ceilings.matmul_tflops.items())
    lines = [
        f"{device.name}, {device.threads} threads, PyTorch {device.torch}, commit {(device.commit or 'unknown')[:10]}, "
        f"measured {results[0].started[:10]}. Ceilings: copy {ceilings.copy_gb_s:.1f} GB/s, matrix product {rates}.",
        "",
        "| op, case | MB | GFLOP | attainable ms | attained ms | share | eager ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        lines += _lines(result)
    return "\n".join(lines)


def _lines(result: Result) -> list[str]:
    lines, seen = [], set()
    for case, rows in result.cases:
        kind = case["pass"], case["dtype"]
        by_name = {row.variant: row for row in rows}
        ours = by_name.get(OURS)
        if kind in seen or ours is None or ours.timing is None:
            continue
        seen.add(kind)
        words = (f"{v}" if isinstance(v, str) else f"{k} {v}" for k, v in case.items() if k not in ("op", "head_dim"))
        lines.append(
            f"| `{result.op}`, {', '.join(words)} | {_figures(result, case['dtype'], ours, by_name['eager'])} |"
        )
    return lines


def _figures(result: Result, dtype: str, ours: Row, eager: Row) -> str:
    assert ours.timing is not None
    ms = ours.timing.median_ms
    megabytes, gigaflops = (ours.gb_s or 0) * ms, (ours.tflops or 0) * ms
    attainable = megabytes / result.ceilings.copy_gb_s
    if gigaflops and (rate := result.ceilings.matmul_tflops.get(dtype)):
        attainable = max(attainable, gigaflops / rate)
    counted = f"{gigaflops:.2f}" if gigaflops else ""
    peer = f"{eager.timing.median_ms:.3g}" if eager.timing else eager.status
    return f"{megabytes:.2f} | {counted} | {attainable:.3g} | {ms:.3g} | {attainable / ms:.1%} | {peer}"


if __name__ == "__main__":
    if sys.argv[1:]:
        print(markdown(Path(sys.argv[1])))
    else:
        README.write_text(rewritten(README.read_text(), RESULTS))
