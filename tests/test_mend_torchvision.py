"""The installation makes a torchvision whose operators do not load importable, and leaves any other as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "mend_torchvision.py"
EXTENSION = "import torch\n\n\ndef _has_ops():\n    return False\n"
REGISTRATION = 'import torch\nfrom . import extension\n\ntorch.library.register_fake("torchvision::nms")(len)\n'


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torchvision whose import adds a fake kernel to an operator that is declared nowhere."""
    folder = tmp_path / "torchvision"
    folder.mkdir()
    (folder / "__init__.py").write_text(REGISTRATION)
    (folder / "extension.py").write_text(EXTENSION)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return folder


def run() -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT)], env=os.environ, capture_output=True, text=True, timeout=120)


def test_missing_operators_are_declared_once(package: Path) -> None:
    assert run().returncode == 0  # the script itself imports the package before and after
    mended = (package / "extension.py").read_text()
    assert mended.startswith(EXTENSION)
    (package / "__init__.py").write_text(REGISTRATION + "raise RuntimeError('broken otherwise')\n")
    again = run()
    assert again.returncode == 1
    assert "torchvision cannot be imported, see: " in again.stderr
    assert (package / "extension.py").read_text() == mended


def test_an_installation_that_imports_is_left_alone(package: Path) -> None:
    (package / "__init__.py").write_text("")
    assert run().returncode == 0
    assert (package / "extension.py").read_text() == EXTENSION
