"""Static costs of a launch on an H100: instructions of its loops by pipe, and the time in which they can be issued.

A static bound is not a time. It takes every issue slot of 132 x 4 schedulers at 1.755 GHz as used and no cache as
missed, so that a kernel cannot run faster than its code allows; it runs slower. Loops and branches of the machine code
are found by their source lines. How often they run comes from the arguments of a launch (``range(0, num_classes,
BLOCK_K)``), and from ``ASSUMED`` and a caller's own values where the data decide. Every other branch counts as taken
on both sides.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget

from . import sass
from .bilinear import Axis
from .gpu.launches import Launch
from .source import Node, Values, inlined, innermost

TARGET = GPUTarget("cuda", 90, 32)
SCHEDULERS, CLOCK = 132 * 4, 1.755e9
# Names and conditions of the kernels' source that the data decide: finite and near logits, one program a cell, smooth
# maps. ``count`` is the mean of a quarter's candidates in a step of 32 classes where maps are noise.
ASSUMED: dict[str, float] = {"far": 0, "split": 0, "few": 1, "k < num_classes": 2, "count": 7.25}
ASSUMED["tl.sum(sizes, 0) < float('inf')"] = 1


class Flow:
    """Runs of the blocks of a program in one warp, and the loops that they make: (loop, header, passes)."""

    def __init__(self, program: sass.Program, values: Values) -> None:
        self.program, self.values = program, values
        dominators = program.dominators()
        program.prune(lambda block: self._way(block, dominators))
        dominators = program.dominators()
        self.weights = dict.fromkeys(dominators, 1.0)
        self.loops: list[tuple[sass.Loop, str, float]] = []
        nodes_of: dict[sass.Loop, Node] = {}
        for loop in program.loops():
            inside = [other for other in nodes_of if other.blocks < loop.blocks]
            own = self.instructions(loop.blocks.difference(*(other.blocks for other in inside)))
            votes = Counter(node for one in own if (node := innermost(one.line, (ast.For, ast.While))))
            for block in loop.blocks:
                # The branch to the next pass mostly has the line of the loop's header.
                line = self.instructions([block])[-1].line if loop.head in program.blocks[block].after else None
                if line and (header := innermost(line, (ast.For, ast.While))) and header[1].lineno == line[1]:
                    votes[header] += len(own)
            for other in inside:
                votes.pop(nodes_of[other], None)
            if not votes:
                raise LookupError(f"no source line tells which loop begins with {own[0]}")
            node = nodes_of[loop] = votes.most_common(1)[0][0]
            passes = values.passes(node, values.unrolled(node, own))
            self.loops.append((loop, f"{node[0].name}: {ast.unparse(node[1]).partition(':')[0]}", passes))
            for block in loop.blocks:
                self.weights[block] *= passes
        callers: Counter[str] = Counter()
        for number, weight in self.weights.items():
            label = program.blocks[number].calls
            callers[label] += weight * ("slowpath" not in label)  # type: ignore[assignment]
        for block, above in dominators.items():
            for label in callers:
                if label and program.labels[label] in above:
                    self.weights[block] *= callers[label]

    def instructions(self, blocks: Iterable[int]) -> list[sass.Instruction]:
        return [one for block in sorted(blocks) for one in self.program.blocks[block].instructions]

    def _way(self, number: int, dominators: dict[int, set[int]]) -> bool | None:
        """True if the branch that closes a block is taken, False if not, None where its ``if`` is unknown."""
        line = self.program.blocks[number].instructions[-1].line
        node = innermost(line, ast.If)
        if not line or not node or not node[1].test.lineno <= line[1] <= node[1].test.end_lineno:
            return None
        try:
            value = bool(self.values.of(node[1].test, node[0]))
        except LookupError:
            return None
        body, orelse = (inlined(side, line[0], {}) for side in (node[1].body, node[1].orelse))
        score = {True: 0, False: 0}  # instructions of the body alone, less those of the other side, behind each way
        for other, way in self.program.blocks[number].after.items():
            for one in self.instructions(block for block, above in dominators.items() if other in above):
                score[way] += (one.line in body) - (one.line in orelse)
        return None if score[True] == score[False] else (score[True] > score[False]) == value


def cycles(weighted: Iterable[tuple[sass.Instruction, float]]) -> dict[str, float]:
    """Cycles of a scheduler by pipe, and of the issue."""
    found = dict.fromkeys(("issue", *sass.PIPES, ""), 0.0)
    for one, weight in weighted:
        pipe, occupied = one.rate
        found["issue"] += weight
        found[pipe] += weight * occupied
    del found[""]
    return found


def cost(launch: Launch, assumed: dict[str, float]) -> dict[str, Any]:
    """Costs of a launch: resources, microseconds by pipe, and of each innermost loop the costs of a pass."""
    constants = {launch.kernel.arg_names[path[0]]: value for path, value in launch.constants.items() if len(path) == 1}
    values = {**constants, **launch.arguments, **ASSUMED, **assumed}
    values["cell[2]"] = values.get("num_classes")
    for name in "kc":
        values[f"offs_{name}"] = SimpleNamespace(shape=(values.get(f"BLOCK_{name.upper()}"),))
    if "step_y" in values:
        values["tiles"] = math.prod(_tiles(values, axis) for axis in "yx")
    if {"SEGMENT", "size_in_x"} <= values.keys():  # cells of a row that a program owns
        width = values["size_in_x"]
        values |= {"first_cell": 0, "cells": width / math.ceil(width / values["SEGMENT"])}
    compiled = launch.compile(TARGET)
    text, registers = sass.disassemble(compiled.asm["cubin"])
    flow = Flow(sass.Program(text), Values(values))
    instructions, warps, shared = flow.instructions(flow.weights), launch.options["num_warps"], compiled.metadata.shared
    weighted = ((one, weight) for block, weight in flow.weights.items() for one in flow.instructions([block]))
    us = 1e6 * warps * math.prod(launch.grid) / SCHEDULERS / CLOCK
    # Programs (CTAs) that a multiprocessor of sm_90 holds: by number, warps, registers and shared memory.
    resident = min(32, 64 // warps, 65536 // (-(-registers // 8) * 256 * warps), (228 << 10) // (shared + 1024))
    return {
        "kernel": launch.kernel.__name__,
        "tile": {name: values[name] for name in constants if name.startswith("BLOCK")} | launch.options,
        "grid": list(launch.grid),
        "registers": registers,
        "shared": shared,
        "programs_sm": resident,
        "warps_sm": resident * warps,
        "spills": sum(one.base in ("LDL", "STL") for one in instructions),
        "loads": sass.load_widths(instructions),
        "us": {name: us * count for name, count in cycles(weighted).items()},
        "loops": [
            loop_cost(flow.instructions(loop.blocks), header, passes, values)
            for loop, header, passes in flow.loops
            if passes and not any(other.blocks < loop.blocks for other, _, _ in flow.loops)
        ],
    }


def _tiles(values: dict[str, Any], axis: str) -> float:
    """Mean number of tiles along an axis of a cell; outputs before the first centre belong to the first cell."""
    geometry = Axis(*(values[f"{name}_{axis}"] for name in Axis._fields))
    starts, block = (0, *geometry.cell_starts[2:]), values[f"BLOCK_{axis.upper()}"]
    return sum(-(-(end - start) // block) for start, end in pairwise(starts)) / geometry.size_in


def loop_cost(
    instructions: list[sass.Instruction], header: str, passes: float, values: dict[str, Any]
) -> dict[str, Any]:
    """Costs of a pass of an innermost loop; instructions a logit where it steps over the classes of a tile."""
    names = Counter(one.base for one in instructions)
    found: dict[str, Any] = {
        "loop": header,
        "passes": passes,
        "instructions": len(instructions),
        "cycles": {name: count for name, count in cycles((one, 1.0) for one in instructions).items() if count},
        "barriers": names["BAR"],
        "spills": names["LDL"] + names["STL"],
        "mma": {name: names[name] for name in ("HGMMA", "HMMA") if names[name]},
        "async_loads": sass.load_widths(instructions, ("LDGSTS",)),
    }
    classes = any(name in header for name in ("BLOCK_K", "offs_k", "lattices", "range(num_classes)"))
    if {"BLOCK_Y", "BLOCK_X"} <= values.keys() and classes:
        tile = values["BLOCK_Y"] * values["BLOCK_X"] * values.get("BLOCK_K", 1)
        found["per_logit"] = len(instructions) * 32 * values["num_warps"] / tile
    waits = [int(one.operands.split(", ")[1], 16) for one in instructions if one.base == "DEPBAR"]
    if names["LDGDEPBAR"] and waits:  # passes whose loads are in flight while the loop waits
        found["prefetch"] = min(waits) / names["LDGDEPBAR"]
    return found
