"""Ours against every peer, op by op: ``python -m segmenter_fast.benchmarks.kernels upsample_argmax attention``.

Writes ``<out>/<device>/<op>.json`` after each case, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from segmenter_fast.devices import cpu_is_fast_in_bfloat16

from .device import resolve
from .ops import OPS
from .run import Run, add_options


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where a case was refused because our output was wrong."""
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.kernels", description=__doc__)
    parser.add_argument("ops", nargs="+", choices=sorted(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--cases", type=int, help="how many of the most valuable cases of each op (all)")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        device = resolve(options.device)
    except ValueError as error:
        parser.error(str(error))
    start = time.monotonic()
    dtypes = [torch.float32]
    if device.type == "cuda":
        dtypes += [torch.bfloat16, torch.float16]
    elif cpu_is_fast_in_bfloat16():  # elsewhere the large matrix product takes minutes, and is no ceiling
        dtypes += [torch.bfloat16]
    seconds = 0.5 if options.quick or device.type == "cuda" else 2.0
    run = Run.begin(device, dtypes, options.out, options.quick, seconds)
    wrong = 0
    for index, op in enumerate(options.ops):
        deadline = None
        if options.budget is not None:
            now = time.monotonic()
            deadline = now + (start + options.budget - now) / (len(options.ops) - index)
        wrong += run.cases(op, OPS[op](device, options.quick)[: options.cases], deadline)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the cases that were finished are written")
