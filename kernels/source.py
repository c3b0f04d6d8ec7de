"""Source of the kernels: the loop or branch that holds a line, and values of expressions in a launch."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import gpu, sass

Node = tuple[ast.FunctionDef, Any]  # a loop or branch, after its function


@cache
def nodes(file: str) -> list[Node]:
    """Loops and branches in a file of kernels, outer ones first; none in other files."""
    path = Path(gpu.__file__).parent / file
    tree = ast.parse(path.read_text() if path.exists() else "")
    functions = (one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef))
    kinds = ast.For | ast.While | ast.If
    found = [(function, one) for function in functions for one in ast.walk(function) if isinstance(one, kinds)]
    for function, _ in found:
        function.module = tree  # type: ignore[attr-defined]
    return [node for node in found if "static_range" not in ast.unparse(getattr(node[1], "iter", node[0].args))]


def innermost(line: sass.Line | None, kinds: Any) -> Node | None:
    """The innermost node of ``kinds`` that holds a source line."""
    around = (node for node in nodes(line[0]) if node[1].lineno <= line[1] <= node[1].end_lineno) if line else ()
    return next((node for node in reversed([*around]) if isinstance(node[1], kinds)), None)


@cache
def _functions() -> dict[str, list[tuple[str, ast.FunctionDef]]]:
    """The functions of all kernel files with their file, by name."""
    found: dict[str, list[tuple[str, ast.FunctionDef]]] = {}
    for path in sorted(Path(gpu.__file__).parent.glob("*.py")):
        for one in ast.walk(ast.parse(path.read_text())):
            if isinstance(one, ast.FunctionDef):
                found.setdefault(one.name, []).append((path.name, one))
    return found


def inlined(statements: list[ast.stmt], file: str, constants: dict[str, Any]) -> set[sass.Line]:
    """Source lines of statements and of the functions that they call, where a branch by ``constants`` has one side."""
    found: set[sass.Line] = set()
    for one in statements:
        header = [getattr(one, name) for name in ("test", "iter") if hasattr(one, name)]
        for part in header or [one]:
            found |= {(file, line) for line in range(part.lineno, part.end_lineno + 1)}
        for call in (node for part in header or [one] for node in ast.walk(part) if isinstance(node, ast.Call)):
            callees = _functions().get(ast.unparse(call.func), [])
            for name, function in sorted(callees, key=lambda callee: callee[0] != file)[:1]:
                given = {key.arg: key.value for key in call.keywords}
                given |= dict(zip((key.arg for key in function.args.args), call.args, strict=False))
                bound = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
                passed = {key: ast.unparse(value) for key, value in given.items()}
                bound |= {key: constants[value] for key, value in passed.items() if value in constants}
                found |= inlined(function.body, name, bound)  # type: ignore[arg-type]
        known = constants.get(ast.unparse(one.test)) if isinstance(one, ast.If) else None
        for side, taken in (("body", True), ("orelse", False)):
            if known is None or bool(known) == taken:
                found |= inlined(getattr(one, side, []), file, constants)
    return found


class Values:
    """Values of expressions in the kernels' source, from those of names and of whole expressions."""

    def __init__(self, known: dict[str, Any]) -> None:
        language = SimpleNamespace(
            cdiv=lambda a, b: -(-a // b), minimum=min, maximum=max, constexpr=lambda value: value
        )
        self.known = {"tl": language, "min": min, "max": max, **known}

    def of(self, node: ast.expr, function: ast.FunctionDef, asking: frozenset[str] = frozenset()) -> Any:
        """Value of an expression in ``function``, through the names that it assigns once; LookupError if unknown."""
        if (text := ast.unparse(node)) in self.known:
            return self.known[text]
        names = {}
        for name in {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} - self.known.keys():
            for scope in (function, getattr(function, "module", function)):
                assigned = [value for target, value in _assignments(scope) if target == name]
                if len(assigned) == 1 and name not in asking:
                    names[name] = self.of(assigned[0], function, asking | {name})
                    break
            else:
                raise LookupError(f"{name} in {text} of {function.name}")
        try:
            return eval(compile(ast.Expression(node), "kernel", "eval"), {"__builtins__": {}}, {**self.known, **names})
        except Exception as error:
            raise LookupError(f"{text} of {function.name}") from error

    def passes(self, node: Node, unrolled: int) -> float:
        """Passes of a loop; a range over fractions, which are means over programs, has a fraction of them."""
        function, loop = node
        if isinstance(loop, ast.While):
            return float(self.of(loop.test, function))
        for outer in (one for one in ast.walk(function) if isinstance(one, ast.For) and loop in ast.walk(one)):
            name = ast.unparse(outer.target)
            # A range that begins where the outer loop is: the mean over it.
            if outer is not loop and name not in self.known and name in map(ast.unparse, ast.walk(loop.iter)):
                values = range(*self.range((function, outer)))
                inner = [Values({**self.known, name: value}).passes(node, unrolled) for value in values]
                return sum(inner) / max(len(inner), 1)
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
        arguments = node[1].iter.args
        step = self.of(arguments[2], node[0]) if len(arguments) == 3 else 1
        lines = [one for one in instructions if one.line and one.line[1] == node[1].lineno]
        operands = [one.operands.replace(".reuse", "").split(", ") for one in lines]
        compared = {name for one, names in zip(lines, operands, strict=True) if "SETP" in one.base for name in names}
        factors = [1]
        for one, (target, *others) in zip(lines, operands, strict=True):
            if one.base in ("IADD3", "UIADD3", "VIADD") and target in compared.intersection(others):
                added = (int(text, 16) for text in others if text.startswith("0x"))
                factors += [min(value, 2**32 - value) // step for value in added]  # up or down
        return max(factors)


@cache
def _assignments(scope: ast.AST) -> list[tuple[str, ast.expr]]:
    """Names of a function or module and the expressions assigned to them, also as constants of the kernel."""
    plain = [one for one in ast.walk(scope) if isinstance(one, ast.Assign)]
    found = [(ast.unparse(target), one.value) for one in plain for target in one.targets]
    typed = [one for one in ast.walk(scope) if isinstance(one, ast.AnnAssign) and one.value]
    return found + [(ast.unparse(one.target), one.value) for one in typed if one.value]
