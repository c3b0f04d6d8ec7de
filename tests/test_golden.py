"""Outputs of the original programs, reproduced through ``load`` by the model and by the oracle."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import segmenter_fast as sf
from segmenter_fast.reference import ReferenceSegmenter
from support.checkpoints import GOLDEN

SOURCES = {
    "official_mask": "official_mask",
    "official_deit_linear": "official_deit_linear/checkpoint.pth",
    "mmseg_mask": "mmseg_mask/segmenter.pth",
    "mmseg_linear": "mmseg_linear/segmenter.pth",
}
SIZES = {name: ("64x64", "96x64") if "mmseg" in name else ("64x64", "96x64", "70x90") for name in SOURCES}
CASES = [(name, size) for name in SOURCES for size in SIZES[name]]


@pytest.mark.parametrize("oracle", [False, True], ids=["model", "reference"])
@pytest.mark.parametrize(("name", "size"), CASES)
def test_forward_agrees_with_the_original_program(name: str, size: str, oracle: bool) -> None:
    loaded = sf.load(GOLDEN / SOURCES[name])
    model: sf.Segmenter | ReferenceSegmenter = loaded
    if oracle:
        model = ReferenceSegmenter(loaded.config).eval()
        model.load_state_dict(loaded.state_dict())
    case = {
        key.rsplit("/", 1)[1]: tensor
        for key, tensor in load_file(GOLDEN / name / "cases.safetensors").items()
        if key.startswith(f"forward/{size}/")
    }
    with torch.no_grad():
        assert (model(case["image"]) - case["logits"]).abs().max() < 1e-4
        assert ("masks" in case) == ("mmseg" in name)
        if "masks" in case:
            assert (model.masks(case["image"]) - case["masks"]).abs().max() < 1e-4


def test_every_forward_case_is_covered() -> None:
    for name, sizes in SIZES.items():
        keys = load_file(GOLDEN / name / "cases.safetensors")
        assert set(sizes) == {key.split("/")[1] for key in keys if key.startswith("forward/")}
