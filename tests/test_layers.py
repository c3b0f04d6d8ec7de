"""The structure that CONTRIBUTING describes: imports go down only and in no circle, files and the whole stay small."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALLED = {
    "segmenter_fast": "segmenter_fast",
    "kernels": "segmenter_fast.kernels",
    "train": "segmenter_fast.train",
    "benchmarks": "segmenter_fast.benchmarks",
}
TOP = {"segmenter_fast.train", "segmenter_fast.benchmarks"}
FORBIDDEN = {
    "kernels": {"segmenter_fast", "timm", "torchvision", "PIL"},
    "segmenter_fast": {*TOP, "segmenter_fast.cli", "triton"},
    "train": {"segmenter_fast.benchmarks", "segmenter_fast.cli", "triton"},
    "benchmarks": {"segmenter_fast.train", "segmenter_fast.cli"},
}
# The command line stands above everything; it starts train and benchmarks.
ABOVE = Path("segmenter_fast/cli")
# `python -m segmenter_fast.train` and the like start the command line.
STARTERS = "__main__.py"
MOST_LINES, MOST_LINES_OF_A_FILE = 28_700, 300


@cache
def files(folder: str) -> list[Path]:
    """Python files of a folder below the root, relative to it."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))


def package_of(path: Path) -> str:
    """The package that a file's relative imports start from."""
    return ".".join([INSTALLED[path.parts[0]], *path.parts[1:-1]])


def imported(path: Path, package: str) -> set[str]:
    """Absolute names of all modules that a file imports anywhere: in functions and for type checkers, too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def violations(path: Path, package: str, forbidden: set[str]) -> list[str]:
    return [name for name in imported(path, package) for bad in forbidden if (name + ".").startswith(bad + ".")]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_down_only(folder: str) -> None:
    found = files(folder)
    assert found, f"no files in {folder}"
    for path in found:
        if ABOVE in path.parents or path.name == STARTERS:
            continue
        # Inside of kernels only relative imports exist, so that the folder can be taken elsewhere.
        package = "kernels" + package_of(path).removeprefix(INSTALLED["kernels"]) if folder == "kernels" else ""
        assert not violations(ROOT / path, package or package_of(path), FORBIDDEN[folder]), path


def import_graph() -> dict[str, set[str]]:
    """The modules that each module imports, a package's ``__init__`` only where a name of its own is taken."""
    modules = {}
    for folder in INSTALLED:
        for path in files(folder):
            own = package_of(path) if path.stem == "__init__" else f"{package_of(path)}.{path.stem}"
            modules[own] = path
    graph = {}
    for name, path in modules.items():
        found = imported(ROOT / path, package_of(path))
        taken = {other for other in found if other in modules}
        # `from package import module` takes the module; the package itself only where another name comes along.
        packages = {other for other in taken if modules[other].stem == "__init__"}
        for package in packages:
            inside = {other for other in found if other.rpartition(".")[0] == package}
            if inside and inside <= modules.keys():
                taken.discard(package)
        graph[name] = taken - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Each circle of imports once, as the modules along it."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append(path[path.index(name) :])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_no_circle_of_imports() -> None:
    graph = import_graph()
    assert "segmenter_fast.segmenter" in graph["segmenter_fast"]
    assert not circles(graph)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_the_walk_sees_what_it_forbids(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("def f():\n    from .benchmarks import timing\n    import triton.language\n")
    assert violations(probe, "segmenter_fast", FORBIDDEN["segmenter_fast"])
    assert len(violations(probe, "segmenter_fast", {"triton"})) == 1


def lines_of(path: Path) -> int:
    return len((ROOT / path).read_text().splitlines())


def test_no_file_is_long() -> None:
    long = {str(path): lines_of(path) for folder in (*INSTALLED, "tests") for path in files(folder)}
    assert not {name: lines for name, lines in long.items() if lines > MOST_LINES_OF_A_FILE}


def test_the_whole_is_small() -> None:
    assert sum(lines_of(path) for folder in INSTALLED for path in files(folder)) <= MOST_LINES


def test_the_count_of_contributing_is_this_count() -> None:
    command = re.search(r"^git ls-files .*$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)[0]
    counted = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(counted) == sum(lines_of(path) for folder in INSTALLED for path in files(folder))


def docstrings(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, kinds))
    return [ast.get_docstring(node) or "" for node in nodes]


@pytest.mark.parametrize("folder", [*INSTALLED, "tests"])
def test_docstrings_open_with_a_verb_or_a_noun(folder: str) -> None:
    headless = re.compile(r"(What|Whether|Why|How|Which|Where|When|Who|Whose)\b[^?]*$")
    found = [f"{path}: {text}" for path in files(folder) for text in docstrings(path)]
    assert not [text for text in found if headless.match(text.partition(": ")[2].split("\n\n")[0])]
