"""Compile every kernel and launch configuration for every target, without a GPU.

``python -m segmenter_fast.kernels.aot`` prints registers, spills, shared memory and global loads by width, and exits
with 1 where a kernel spills or asks for more shared memory than a block of the chip can have. A build is what Triton
would compile for a launch with representative tensors (``gpu.launches``), its argument specialisation included.

The figures come from the disassembly: ``nvdisasm`` of the Triton wheel, or the text of AMD's assembler. ``--costs``
counts the instructions of a few named problems on an H100 instead (``problems``): static bounds, not times.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError

from .gpu.launches import Launch, record, representative_calls
from .problems import measure, table
from .sass import Program, disassemble, load_widths


class Chip(NamedTuple):
    target: GPUTarget
    shared_limit: int  # bytes of shared memory that one block can have


CHIPS = {
    "sm_75": Chip(GPUTarget("cuda", 75, 32), 64 << 10),
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 99 << 10),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 99 << 10),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 << 10),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99 << 10),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 << 10),
    "gfx950": Chip(GPUTarget("hip", "gfx950", 64), 160 << 10),
}


@dataclass(frozen=True)
class Build:
    """Figures of one build. ``spills`` counts vector registers (AMD) or accesses to local memory (NVIDIA)."""

    name: str
    arch: str
    registers: int
    spills: int
    shared: int
    loads: dict[int, int]  # width in bits -> global load instructions
    error: str = ""  # of the compiler

    @property
    def defect(self) -> str:
        """Reason not to ship the build, or an empty text."""
        if self.error:
            return self.error
        limit = CHIPS[self.arch].shared_limit
        if self.shared > limit:
            return f"{self.shared} bytes of shared memory, {self.arch} has {limit}"
        return f"{self.spills} spills" if self.spills else ""


def shipped(arch: str) -> list[Launch]:
    """All launches on ``arch``, as recorded."""
    return record(CHIPS[arch].target, representative_calls(arch))


def build(launch: Launch, arch: str) -> Build:
    """Compile and measure. A build that the compiler refuses is one with a defect."""
    try:
        compiled = launch.compile(CHIPS[arch].target)
    except (TritonError, RuntimeError) as error:
        return Build(launch.name, arch, 0, 0, 0, {}, f"{type(error).__name__}: {error}")
    if CHIPS[arch].target.backend == "hip":
        registers, spills, loads = _read_amdgcn(compiled.asm["amdgcn"])
    else:
        registers, spills, loads = _read_cubin(compiled.asm["cubin"])
    return Build(launch.name, arch, registers, spills, compiled.metadata.shared, loads)


def _read_amdgcn(text: str) -> tuple[int, int, dict[int, int]]:
    def sum_of(key: str) -> int:
        return sum(int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", text))

    widths = {"ubyte": 8, "sbyte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}
    widths |= {f"dwordx{n}": 32 * n for n in (2, 3, 4)}
    loads = re.findall(r"^\s+(?:global|buffer|flat)_load_(?:lds_)?(dwordx\d|[a-z]+)", text, re.MULTILINE)
    counts = Counter(widths[width] for width in loads)
    return sum_of("vgpr_count"), sum_of("vgpr_spill_count"), dict(counts)


def _read_cubin(cubin: bytes) -> tuple[int, int, dict[int, int]]:
    text, registers = disassemble(cubin)
    instructions = [one for block in Program(text).blocks for one in block.instructions]
    return registers, sum(one.base in ("LDL", "STL") for one in instructions), load_widths(instructions)


def _build_named(arch: str, names: Sequence[str]) -> list[Build]:
    return [build(launch, arch) for launch in shipped(arch) if launch.name in names]


def build_all(wanted: Sequence[tuple[str, str]], jobs: int = 2) -> list[Build]:
    """Builds of ``(arch, name)`` pairs, in ``jobs`` processes. Kernels cannot be sent to them, names can."""
    groups: dict[str, list[str]] = {}
    for arch, name in wanted:
        groups.setdefault(arch, []).append(name)
    tasks = [(arch, names[n : n + 8]) for arch, names in groups.items() for n in range(0, len(names), 8)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_build_named, *task) for task in tasks]
        return [one for future in futures for one in future.result()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a build has a defect."""
    parser = argparse.ArgumentParser(prog="python -m segmenter_fast.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--only", default="", help="only builds, or problems of --costs, whose name contains this text")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--costs", action="store_true", help="static bounds of named problems on sm_90")
    parser.add_argument("--json", type=Path, help="file that --costs writes its figures to")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled")
    if options.json and not options.costs:
        parser.error("--json is the file of --costs; give both")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if options.costs:
        found = measure(options.only)
        if not found:
            parser.error(f"--only: no problem's name contains {options.only!r}; --costs alone lists all")
        print(table(found))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    wanted = [(arch, one.name) for arch in options.arch for one in shipped(arch) if options.only in one.name]
    if not wanted:
        parser.error(f"--only: no build for {', '.join(options.arch)} has {options.only!r} in its name")
    builds = build_all(wanted, options.jobs)
    width = max((len(one.name) for one in builds), default=0)
    print(f"{'kernel':{width}}  target  registers  spills  shared / limit   global loads (count x bits)")
    for one in builds:
        loads = ", ".join(f"{count} x {bits}" for bits, count in sorted(one.loads.items(), reverse=True))
        memory = f"{one.shared:6} / {CHIPS[one.arch].shared_limit:6}"
        print(f"{one.name:{width}}  {one.arch:6}  {one.registers:9}  {one.spills:6}  {memory}  {loads}")
    defects = [one for one in builds if one.defect]
    for one in defects:
        print(f"{one.name} on {one.arch}: {one.defect}", file=sys.stderr)
    return 1 if defects else 0


if __name__ == "__main__":
    raise SystemExit(main())
