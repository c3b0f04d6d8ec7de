"""Every Python example of the README runs as written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

import segmenter_fast as sf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BACKBONES = re.findall(r"\| `(sf\.create_model\(.*?\))` \|", README)


@pytest.fixture
def _user_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide the files that the examples name: a checkpoint and a photograph."""
    shutil.copytree(ROOT / "tests" / "golden" / "official_mask", tmp_path / "checkpoint")
    shutil.copy(ROOT / "segmenter_fast" / "assets" / "coffee.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.usefixtures("_user_files")
@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example(index: int) -> None:
    exec(compile(EXAMPLES[index], f"README example {index + 1}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("line", BACKBONES)
def test_the_line_for_a_backbone_names_weights_that_fit(line: str) -> None:
    from segmenter_fast.weights.timm import encoder_state

    def fits(variant: str, pretrained: str, freeze_encoder: bool = False, **fields: Any) -> bool:
        config = sf.VARIANTS[variant].replace(**fields)
        name = config.timm_backbone if pretrained == "timm" else pretrained
        if name == "backbone.pth":
            return True
        with torch.device("meta"):
            theirs = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
            ours = sf.Segmenter(config).encoder.state_dict()
        shapes = {key: value.shape for key, value in encoder_state(theirs, config).items()}
        return shapes == {key: value.shape for key, value in ours.items()}

    assert eval(line, {"sf": SimpleNamespace(create_model=fits)})


def test_the_table_names_every_kind_of_backbone() -> None:
    assert len(BACKBONES) >= 6
