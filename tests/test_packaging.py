"""A wheel contains every package of the tree under its installed name."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import segmenter_fast as sf

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "segmenter_fast": "",
    "kernels": "segmenter_fast.",
    "train": "segmenter_fast.",
    "benchmarks": "segmenter_fast.",
}
LISTED = set(
    re.findall(
        r'"(segmenter_fast[\w.]*)",', re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    )
)


def packages() -> set[str]:
    return {
        prefix + ".".join(path.parent.relative_to(ROOT).parts)
        for folder, prefix in FOLDERS.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }


def test_every_package_is_listed() -> None:
    assert packages() == LISTED


def test_every_folder_with_modules_is_a_package() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


@pytest.mark.parametrize("name", sorted(LISTED))
def test_packages_import_under_their_installed_names(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_every_asset_is_package_data() -> None:
    patterns = re.search(r"^segmenter_fast = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    package = ROOT / "segmenter_fast"
    listed = {path for pattern in re.findall(r'"(.*?)"', patterns) for path in package.glob(pattern) if path.is_file()}
    assets = {path for path in (package / "assets").rglob("*") if path.is_file()}
    assert package / "assets" / "shapes" / "model.safetensors" in assets
    assert assets <= listed
    assert sum(path.stat().st_size for path in assets) < 7_000_000


def test_the_version_has_one_source() -> None:
    """A literal, which the build reads without importing the package."""
    project = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "segmenter_fast.version.__version__" }' in project
    assert not re.search(r'^version = "', project, re.M)
    assert importlib.metadata.version("segmenter-fast") == sf.__version__


def test_a_checkout_can_be_imported_as_it_is(tmp_path: Path) -> None:
    """Its own parts are taken, although the package is installed elsewhere."""
    for folder in FOLDERS:
        (tmp_path / folder).symlink_to(ROOT / folder)
    code = "from segmenter_fast import kernels, train; print(kernels.__file__, train.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / name / "__init__.py") for name in ("kernels", "train")]
