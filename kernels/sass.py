"""Machine code of NVIDIA kernels: instructions with their source lines, blocks and loops of the control flow.

``nvdisasm`` and ``cuobjdump`` of the Triton wheel disassemble.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import triton

Line = tuple[str, int]  # file name, line

# Cycles that a warp instruction occupies a pipe of its scheduler on an H100; of the others only the issue counts.
_PIPES = {
    ("fma", 1): "FFMA FMUL FADD HFMA2 HMUL2 HADD2 FFMA2 FMUL2 FADD2 FFMA32I FMUL32I FADD32I",
    ("fma", 2): "IMAD IMUL",
    (
        "alu",
        2,
    ): "IADD IADD3 VIADD VIADDMNMX LOP LOP3 PLOP3 SHF LEA ISETP FSETP FSET FSEL SEL FMNMX IMNMX VIMNMX PRMT MOV"
    " IABS BMSK SGXT P2R R2P CS2R FCHK VOTE F2FP I2FP HMNMX2 HSETP2 HSET2 ISCADD",
    ("xu", 8): "MUFU F2F F2I I2F I2I FRND POPC FLO BREV",
    ("lsu", 4): "LDS STS LDSM STSM SHFL LDG STG LDGSTS LD ST LDL STL ATOM ATOMS ATOMG RED MATCH",
    ("tensor", 8): "HMMA IMMA QMMA",
}
RATES = {name: rate for rate, names in _PIPES.items() for name in names.split()}
PIPES = ("fma", "alu", "xu", "lsu", "tensor")

_TOKEN = re.compile(
    r"""^\s*(?://\#\#\ File\ "(?P<file>[^"]+)",\ line\ (?P<line>\d+)
    |(?P<label>[.$\w]+):\s*$
    |/\*[0-9a-f]{4,}\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;\n]*?)\s*;)""",
    re.MULTILINE | re.VERBOSE,
)
_TARGET = re.compile(r"`\((\S+?)\)")


class Instruction(NamedTuple):
    predicate: str  # "P0", "!UP1" or ""
    name: str  # with modifiers: "LDG.E.128"
    operands: str
    line: Line | None  # of the Python source, innermost where functions are inlined

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def rate(self) -> tuple[str, float]:
        """Pipe and cycles of a warp instruction; "" where only its issue counts."""
        if self.base == "HGMMA":  # four warps share 4096 floating point operations a cycle
            m, n, k = map(int, re.findall(r"(\d+)x(\d+)x(\d+)", self.name)[0])
            return "tensor", 2 * m * n * k / 4096
        return RATES.get(self.base, ("", 0))


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    after: dict[int, bool] = field(default_factory=dict)  # block -> whether the closing branch is taken to it
    calls: str = ""  # label of the subroutine that it ends with


class Loop(NamedTuple):
    head: int
    blocks: frozenset[int]


def disassemble(cubin: bytes) -> tuple[str, int]:
    """Text of ``nvdisasm`` with source lines, and registers of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tools = triton.knobs.nvidia
        usage, text = (
            subprocess.run([*command, str(path)], check=True, capture_output=True, text=True).stdout
            for command in ((tools.cuobjdump.path, "-res-usage"), (tools.nvdisasm.path, "-g", "-c"))
        )
    (registers,) = re.findall(r"REG:(\d+)", usage)
    return text, int(registers)


def load_widths(instructions: Iterable[Instruction], names: tuple[str, ...] = ("LDG", "LDGSTS")) -> dict[int, int]:
    """Width in bits -> loads from global memory."""
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    found = (one.name.split(".") for one in instructions if one.base in names)
    return dict(Counter(next((sizes[part] for part in parts if part in sizes), 32) for parts in found))


class Program:
    """Control flow of a disassembled kernel. The last block is the end; subroutines start at the labels of calls."""

    def __init__(self, text: str) -> None:
        self.blocks: list[Block] = []
        self.labels: dict[str, int] = {}
        line, ended = None, True
        for token in _TOKEN.finditer(text):
            if token["file"]:
                line = (token["file"].rpartition("/")[2], int(token["line"]))
            elif token["label"]:
                self.labels[token["label"]], ended = len(self.blocks), True
            else:
                if ended:
                    self.blocks.append(Block())
                one = Instruction(token["predicate"] or "", token["name"], token["operands"], line)
                self.blocks[-1].instructions.append(one)
                ended = one.base in ("BRA", "EXIT", "RET", "CALL", "BSYNC")
        self.blocks.append(Block())
        self._connect()

    def _connect(self) -> None:
        joins: dict[str, int] = {}  # barrier register -> block where its threads meet
        end = len(self.blocks) - 1
        for number, block in enumerate(self.blocks[:-1]):
            for one in block.instructions:
                if one.base == "BSSY":
                    joins[one.operands.partition(",")[0]] = self.labels[_TARGET.findall(one.operands)[0]]
            last, following = block.instructions[-1], number + 1
            target = "".join(_TARGET.findall(last.operands)[:1])
            branch = last.base == "BRA" and ".DIV" not in last.name  # to code for divergent warps: never
            if branch or last.base == "EXIT":
                block.after[self.labels[target] if branch else end] = True
            elif last.base == "CALL":
                block.calls = target
            elif last.base == "BSYNC":
                following = joins.get(last.operands, following)
            predicated = last.predicate or (branch and last.operands != f"`({target})")
            if following < end and (predicated or not (branch or last.base in ("EXIT", "RET"))):
                block.after.setdefault(following, False)

    def roots(self) -> set[int]:
        return {0, *(self.labels[block.calls] for block in self.blocks if block.calls)}

    def prune(self, taken: Callable[[int], bool | None]) -> None:
        """Drop the side of each conditional branch that ``taken(block)`` excludes; None keeps both."""
        for number, block in enumerate(self.blocks):
            if len(block.after) == 2 and (known := taken(number)) is not None:
                block.after = {other: way for other, way in block.after.items() if way == known}

    def before(self) -> dict[int, list[int]]:
        """Of each reachable block those that it may follow."""
        found: dict[int, list[int]] = {}
        waiting = list(self.roots())
        while waiting:
            if (block := waiting.pop()) not in found:
                found[block] = []
                waiting.extend(self.blocks[block].after)
        for block in found:
            for other in self.blocks[block].after:
                found[other].append(block)
        return found

    def dominators(self) -> dict[int, set[int]]:
        """Of each reachable block those that every way to it passes, itself included."""
        before, roots = self.before(), self.roots()
        found = {block: {block} if block in roots else set(before) for block in before}
        changed = True
        while changed:
            changed = False
            for block in sorted(before.keys() - roots):
                new = {block}.union(set.intersection(*(found[other] for other in before[block])))
                changed, found[block] = changed or new != found[block], new
        return found

    def loops(self) -> list[Loop]:
        """Natural loops, inner ones first; loops with one head are one."""
        before, bodies = self.before(), dict[int, set[int]]()
        for block, above in self.dominators().items():
            for head in above & self.blocks[block].after.keys():
                body, waiting = bodies.setdefault(head, {head}), [block]
                while waiting:
                    if (one := waiting.pop()) not in body:
                        body.add(one)
                        waiting.extend(before[one])
        loops = (Loop(head, frozenset(body)) for head, body in bodies.items())
        return sorted(loops, key=lambda loop: (len(loop.blocks), loop.head))
