"""Imports go down only: cli, train, benchmarks -> segmenter_fast -> kernels."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = {"segmenter_fast.train", "segmenter_fast.benchmarks"}
FORBIDDEN = {
    "kernels": {"segmenter_fast", "timm", "torchvision", "PIL"},
    "segmenter_fast": {*TOP, "triton"},
    "train": {"segmenter_fast.benchmarks", "triton"},
    "benchmarks": {"segmenter_fast.train"},
}
# The command line stands above everything; it starts train and benchmarks.
ABOVE = Path("segmenter_fast/cli")


def imported(path: Path, package: str) -> set[str]:
    """Absolute names of all modules that a file imports anywhere, functions included."""
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


def files(folder: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))


def violations(path: Path, package: str, forbidden: set[str]) -> list[str]:
    return [name for name in imported(path, package) for bad in forbidden if (name + ".").startswith(bad + ".")]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_down_only(folder: str) -> None:
    found = files(folder)
    assert found, f"no files in {folder}"
    for path in found:
        if ABOVE in path.parents:
            continue
        inside = ".".join(path.parts[1:-1])
        package = folder if folder in ("segmenter_fast", "kernels") else f"segmenter_fast.{folder}"
        package = f"{package}.{inside}" if inside else package
        forbidden = FORBIDDEN[folder]
        assert not violations(ROOT / path, package, forbidden), path


def test_the_walk_sees_what_it_forbids(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("def f():\n    from .benchmarks import timing\n    import triton.language\n")
    assert violations(probe, "segmenter_fast", FORBIDDEN["segmenter_fast"])
    assert len(violations(probe, "segmenter_fast", {"triton"})) == 1
