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
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget

from . import gpu, sass
from .bilinear import Axis
from .gpu.launches import Launch

TARGET = GPUTarget("cuda", 90, 32)
SCHEDULERS, CLOCK = 132 * 4, 1.755e9
# Names and conditions of the kernels' source that the data decide: near logits, one program a cell, smooth maps.
ASSUMED: dict[str, float] = {"far": 0, "split": 0, "tl.min(k, 0) < num_classes": 2}

Node = tuple[ast.FunctionDef, Any]  # a loop or branch, after its function


@cache
def nodes(file: str) -> list[Node]:
    """Loops and branches in a file of kernels, outer ones first; none in other files."""
    path = Path(gpu.__file__).parent / file
    tree = ast.parse(path.read_text() if path.exists() else "")
    functions = (one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef))
    kinds = ast.For | ast.While | ast.If
    found = [(function, one) for function in functions for one in ast.walk(function) if isinstance(one, kinds)]
    return [node for node in found if "static_range" not in ast.unparse(getattr(node[1], "iter", node[0].args))]


def innermost(line: sass.Line | None, kinds: Any) -> Node | None:
    """The innermost node of ``kinds`` that holds a source line."""
    around = (node for node in nodes(line[0]) if node[1].lineno <= line[1] <= node[1].end_lineno) if line else ()
    return next((node for node in reversed([*around]) if isinstance(node[1], kinds)), None)


class Values:
    """Values of expressions in the kernels' source, from those of names and of whole expressions."""

    def __init__(self, known: dict[str, Any]) -> None:
        language = SimpleNamespace(range=range, cdiv=lambda a, b: -(-a // b), minimum=min, maximum=max)
        self.known = {"tl": language, "min": min, "max": max, **known}

    def of(self, node: ast.expr, function: ast.FunctionDef) -> Any:
        """Value of an expression in ``function``, through the names that it assigns once; LookupError if unknown."""
        if (text := ast.unparse(node)) in self.known:
            return self.known[text]
        names = {}
        for name in {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}:
            if name not in self.known:
                assignments = (one for one in ast.walk(function) if isinstance(one, ast.Assign))
                assigned = [one.value for one in assignments if name in map(ast.unparse, one.targets)]
                if len(assigned) != 1:
                    raise LookupError(f"{name} in {text} of {function.name}")
                names[name] = self.of(assigned[0], function)
        try:
            return eval(compile(ast.Expression(node), "kernel", "eval"), {"__builtins__": {}}, {**self.known, **names})
        except Exception as error:
            raise LookupError(f"{text} of {function.name}") from error

    def passes(self, node: Node, unrolled: int) -> float:
        """Passes of a loop; a range over fractions, which are means over programs, has a fraction of them."""
        function, loop = node
        if isinstance(loop, ast.While):
            return float(self.of(loop.test, function))
        start, stop, step = self.range(node)
        if all(isinstance(one, int) for one in (start, stop, step)):
            return len(range(start, stop, step)) // unrolled
        return max(0.0, (stop - start) / step / unrolled)

    def range(self, node: Node) -> tuple[Any, Any, Any]:
        bounds = [self.of(one, node[0]) for one in node[1].iter.args]
        return (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1)[:3]

    def unrolled(self, node: Node, instructions: list[sass.Instruction]) -> int:
        """Passes of a loop in one of the machine code's: the increment of the compared index over the step."""
        if isinstance(node[1], ast.While):
            return 1
        lines = [one for one in instructions if one.line and one.line[1] == node[1].lineno]
        operands = [one.operands.replace(".reuse", "").split(", ") for one in lines]
        compared = {name for one, names in zip(lines, operands, strict=True) if "SETP" in one.base for name in names}
        factors = [1]
        for one, (target, *others) in zip(lines, operands, strict=True):
            if one.base in ("IADD3", "UIADD3", "VIADD") and target in compared.intersection(others):
                factors += [int(text, 16) // self.range(node)[2] for text in others if text.startswith("0x")]
        return max(factors)


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
        score = {True: 0, False: 0}  # lines of the body, less those of the other side, behind each way
        for other, way in self.program.blocks[number].after.items():
            for one in self.instructions(block for block, above in dominators.items() if other in above):
                for sign, statements in ((1, node[1].body), (-1, node[1].orelse)):
                    if one.line and statements and one.line[0] == line[0]:
                        score[way] += sign * (statements[0].lineno <= one.line[1] <= statements[-1].end_lineno)
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
    if "step_y" in values:
        values["tiles"] = math.prod(_tiles(values, axis) for axis in "yx")
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
    if "BLOCK_K" in header and {"BLOCK_Y", "BLOCK_X"} <= values.keys() and "argmax" not in header:
        tile = values["BLOCK_Y"] * values["BLOCK_X"] * values["BLOCK_K"]
        found["per_logit"] = len(instructions) * 32 * values["num_warps"] / tile
    waits = [int(one.operands.split(", ")[1], 16) for one in instructions if one.base == "DEPBAR"]
    if names["LDGDEPBAR"] and waits:  # passes whose loads are in flight while the loop waits
        found["prefetch"] = min(waits) / names["LDGDEPBAR"]
    return found
