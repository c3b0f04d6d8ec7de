"""Sources that cannot be loaded: the message says what was found, where, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import segmenter_fast as sf
from segmenter_fast.weights import hub
from segmenter_fast.weights.reading import CheckpointError


@pytest.fixture
def model() -> sf.Segmenter:
    return sf.create_model("seg_t_mask_16", num_classes=3, image_size=64, depth=1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_whole_pickled_model(wrapped: bool, tmp_path: Path) -> None:
    whole = nn.Sequential(nn.Linear(2, 3))
    torch.save({"model": whole, "epoch": 3} if wrapped else whole, tmp_path / "whole.pt")
    with pytest.raises(
        CheckpointError, match=r"Sequential\), a whole model .* torch\.save\(model\.state_dict\(\), path\)"
    ):
        sf.load(tmp_path / "whole.pt")


def test_a_folder_with_half_of_a_model(model: sf.Segmenter, tmp_path: Path) -> None:
    (tmp_path / "official").mkdir()
    torch.save({"model": model.state_dict()}, tmp_path / "official/checkpoint.pth")
    with pytest.raises(
        FileNotFoundError, match=r"variant\.yml: no such file; .*checkpoint\.pth alone is loaded by its own"
    ):
        sf.load(tmp_path / "official")
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours/config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file; .*model\.safetensors alone is loaded"):
        sf.load(tmp_path / "ours")


def test_an_encoder_alone(model: sf.Segmenter) -> None:
    encoder = {key.removeprefix("encoder."): value for key, value in model.state_dict().items() if "encoder." in key}
    with pytest.raises(CheckpointError, match=r"in timm's or Meta's names.*create_model\(variant, pretrained=\.\.\.\)"):
        sf.load(encoder)


@pytest.mark.parametrize("names", ["official", "hugging face"])
def test_positions_of_no_square_grid(names: str, model: sf.Segmenter) -> None:
    state = model.state_dict() | {"encoder.pos_embed": torch.zeros(1, 1 + 24, 192)}
    if names == "hugging face":
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.ViTConfig(image_size=(64, 96), hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        state = transformers.ViTModel(config).state_dict()
    with pytest.raises(CheckpointError, match=r"24 (patches|position_embeddings of patches).*1 (of )?other tokens"):
        sf.load(state)


def test_dinov3_without_its_configuration() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.DINOv3ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, use_gated_mlp=True, hidden_act="silu"
    )
    with (
        pytest.warns(UserWarning, match=r"rope_theta 100 and the activation 'silu'.*are assumed"),
        pytest.warns(UserWarning, match="random now"),
    ):
        sf.load(transformers.DINOv3ViTModel(config).state_dict())


def test_paths(model: sf.Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "hf_hub_download", no_network)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for load in (sf.load, lambda source: sf.create_model(pretrained=source)):
        with pytest.raises(CheckpointError, match="source is empty"):
            load("")
    (tmp_path / "run").mkdir()
    model.save_pretrained(tmp_path / "run/last")
    with pytest.raises(
        FileNotFoundError, match=r"run/best: no such file or folder; .*run has last\. .*from_pretrained"
    ):
        sf.load("run/best")
    assert sf.load("~/run/last").config == model.config
