"""Every Python example of the README runs as written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def _user_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples speak of: a checkpoint and a photograph."""
    shutil.copytree(ROOT / "tests" / "golden" / "official_mask", tmp_path / "checkpoint")
    shutil.copy(ROOT / "segmenter_fast" / "assets" / "coffee.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.usefixtures("_user_files")
@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example(index: int) -> None:
    if "import timm" in EXAMPLES[index]:
        from segmenter_fast.weights.timm import import_timm

        import_timm()  # where torch is a CPU build and torchvision is not
    exec(compile(EXAMPLES[index], f"README example {index + 1}", "exec"), {"__name__": "readme"})
