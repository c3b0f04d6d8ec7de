"""Compile every shipped kernel and launch configuration ahead of time, for targets that need not be at hand.

``python -m segmenter_fast.kernels.aot`` prints registers, spills, shared memory and global loads by width, and exits
with 1 where a kernel spills or asks for more shared memory than a block of the chip can have. A build gets the
attributes that a real launch gives it: pointers, and strides unless ``Specialization.odd`` names them, are divisible
by 16, arguments that the kernel does not specialise are not; without them another, slower kernel is built.

The figures come from the disassembly: ``cuobjdump`` of the Triton wheel, or the text of AMD's assembler.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from .gpu.common import Specialization


@dataclass(frozen=True)
class Chip:
    """A target and the shared memory, in bytes, that one block can have."""

    target: GPUTarget
    shared_limit: int


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 << 10),
}
MODULES = (
    "attention_forward",
    "attention_backward",
    "lattice",
    "mask_scores",
    "upsample_argmax",
    "upsample_softmax",
    "upsample_cross_entropy",
)


@dataclass(frozen=True)
class Build:
    """What the disassembly of one build says. ``spills`` counts vector registers (AMD) or local accesses (NVIDIA)."""

    name: str
    arch: str
    registers: int
    spills: int
    shared: int
    loads: dict[int, int]  # width in bits -> global load instructions
    error: str = ""  # of the compiler

    @property
    def defect(self) -> str:
        """Why the build must not ship, or nothing."""
        if self.error:
            return self.error
        limit = CHIPS[self.arch].shared_limit
        if self.shared > limit:
            return f"{self.shared} bytes of shared memory, {self.arch} has {limit}"
        return f"{self.spills} spills" if self.spills else ""


def shipped(arch: str) -> Iterator[Specialization]:
    """Every build of every kernel module for ``arch``, each once."""
    seen: dict[str, Specialization] = {}
    for module in MODULES:
        for parts in importlib.import_module(f".gpu.{module}", __package__).specializations(arch):
            specialization = Specialization(*parts)
            if seen.setdefault(specialization.name, specialization) is specialization:
                yield specialization
            elif seen[specialization.name] != specialization:
                raise ValueError(f"two different builds for {arch} are called {specialization.name!r}")


def compile_kernel(specialization: Specialization, arch: str) -> Any:
    """The compiled kernel, as a launch on ``arch`` would compile it.

    Raises:
        ValueError: an argument of the kernel has neither a type nor a value, or both.
    """
    name, kernel, types, constants, options, odd = specialization
    if set(types) & set(constants) or set(types) | set(constants) != set(kernel.arg_names):
        wrong = (set(types) | set(constants)) ^ set(kernel.arg_names) or set(types) & set(constants)
        raise ValueError(f"{name}: signature and constexprs must name each argument once, wrong: {sorted(wrong)}")
    target = CHIPS[arch].target
    attributes = {}
    for position, parameter in enumerate(kernel.params):
        kind = types.get(parameter.name, "")
        if kind.startswith("*"):
            # On AMD a launch also tells that a tensor is smaller than 2 GiB.
            small = [["tt.pointer_range", 32]] if target.backend == "hip" else []
            attributes[(position,)] = [["tt.divisibility", 16], *small]
        elif kind and parameter.name.startswith("stride_"):
            fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            if parameter.name not in odd and not fixed:
                attributes[(position,)] = [["tt.divisibility", 16]]
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=dict(options))


def build(specialization: Specialization, arch: str) -> Build:
    """Compile and measure. A build that the compiler refuses is one with a defect."""
    try:
        compiled = compile_kernel(specialization, arch)
    except (TritonError, RuntimeError) as error:
        return Build(specialization.name, arch, 0, 0, 0, {}, f"{type(error).__name__}: {error}")
    if CHIPS[arch].target.backend == "hip":
        registers, spills, loads = _read_amdgcn(compiled.asm["amdgcn"])
    else:
        registers, spills, loads = _read_cubin(compiled.asm["cubin"])
    return Build(specialization.name, arch, registers, spills, compiled.metadata.shared, loads)


def _read_amdgcn(text: str) -> tuple[int, int, dict[int, int]]:
    def sum_of(key: str) -> int:
        return sum(int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", text))

    widths = {"ubyte": 8, "sbyte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}
    widths |= {f"dwordx{n}": 32 * n for n in (2, 3, 4)}
    loads = re.findall(r"^\s+(?:global|buffer|flat)_load_(?:lds_)?(dwordx\d|[a-z]+)", text, re.MULTILINE)
    counts = Counter(widths[width] for width in loads)
    return sum_of("vgpr_count"), sum_of("vgpr_spill_count"), dict(counts)


def _read_cubin(cubin: bytes) -> tuple[int, int, dict[int, int]]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, flag, str(path)], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    (registers,) = re.findall(r"REG:(\d+)", usage)
    counts: Counter[int] = Counter()
    for modifiers in re.findall(r"\b(?:LDG|LDGSTS)((?:\.\w+)*)", sass):
        sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
        counts[next((sizes[token] for token in modifiers.split(".") if token in sizes), 32)] += 1
    return int(registers), len(re.findall(r"\b(?:STL|LDL)\b", sass)), dict(counts)


def _build_nth(arch: str, indices: Sequence[int]) -> list[Build]:
    specializations = list(shipped(arch))
    return [build(specializations[index], arch) for index in indices]


def build_all(wanted: Sequence[tuple[str, str]], jobs: int = 2) -> list[Build]:
    """Builds of ``(arch, name)`` pairs, in ``jobs`` processes. Kernels cannot travel to them, names can."""
    positions = {arch: {s.name: n for n, s in enumerate(shipped(arch))} for arch in {arch for arch, _ in wanted}}
    groups: dict[str, list[int]] = {}
    for arch, name in wanted:
        groups.setdefault(arch, []).append(positions[arch][name])
    tasks = [(arch, indices[n : n + 8]) for arch, indices in groups.items() for n in range(0, len(indices), 8)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_build_nth, *task) for task in tasks]
        return [one for future in futures for one in future.result()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a build has a defect."""
    parser = argparse.ArgumentParser(prog="python -m segmenter_fast.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--only", default="", help="builds whose name holds this text")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    if not all(hasattr(s.kernel, "create_binder") for s in shipped(options.arch[0])):
        parser.error("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled")
    wanted = [(arch, s.name) for arch in options.arch for s in shipped(arch) if options.only in s.name]
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
