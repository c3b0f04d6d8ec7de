"""Backbones of transformers: features in both generations of names, numerics, and what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor, nn

import segmenter_fast as sf
from segmenter_fast.reference import ReferenceSegmenter
from segmenter_fast.weights.reading import CheckpointError
from support.checkpoints import same
from support.huggingface import MODELS, build, transformers
from support.real import WEIGHTS, needs_real_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*is a backbone", "ignore:.*comes without config.json")
SIZES = [(48, 48), (32, 72), (80, 56)]  # the positions' own, their number in another shape, another number


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Normalised patch features of a model of transformers."""
    base = getattr(model, "vit", None) or getattr(model, "dinov2", None) or model
    options = {"interpolate_pos_encoding": True} if base.config.model_type in ("vit", "deit") else {}
    with torch.no_grad():
        tokens = base(images, **options).last_hidden_state
    rows, columns = (side // base.config.patch_size for side in images.shape[2:])
    return tokens[:, tokens.shape[1] - rows * columns :]


def assert_same_features(ours: sf.Segmenter, theirs: nn.Module, sizes: list[tuple[int, int]] = SIZES) -> None:
    reference = ReferenceSegmenter(ours.config).eval()
    reference.load_state_dict(ours.state_dict())
    for size in sizes:
        images = torch.randn(2, 3, *size)
        expected = features(theirs, images)
        for encoder in (ours.encoder, reference.encoder):
            with torch.no_grad():
                difference = (encoder.eval()(images) - expected).abs().max()
            assert difference <= 2e-5 * expected.abs().max(), (size, difference)


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model, and the folder that its ``save_pretrained`` wrote."""
    model = build(request.param)
    model.save_pretrained(tmp_path / request.param)
    return model, tmp_path / request.param


def test_load_has_the_features_of_transformers(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    with pytest.warns(UserWarning, match="is a backbone: the tensors of a mask decoder for 5 classes are random"):
        ours = sf.load(folder, num_classes=5)
    assert_same_features(ours, model)
    with torch.no_grad():
        assert ours(torch.randn(1, 3, 50, 40)).shape == (1, 5, 50, 40)
    file = load_file(folder / "model.safetensors")
    assert any(".attention.attention.query." in key for key in file) or "dinov3" in folder.name
    heads = {"num_heads": 2, "decoder_num_heads": 2, "rope_temperature": ours.config.rope_temperature}
    for state in (model.state_dict(), file):
        again = sf.load(state, num_classes=5, **heads)
        assert again.config == ours.config.replace(mean=again.config.mean, std=again.config.std)
        assert same(again.encoder.state_dict(), ours.encoder.state_dict())


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("vit", "seg_s_mask_16"),
        ("deit", "seg_s_deit_mask_16"),
        ("dinov2", "seg_s_dinov2_linear_14"),
        ("dinov2_registers", "seg_s_dinov2_linear_14"),
        ("dinov3", "seg_s_dinov3_linear_16"),
    ],
)
def test_create_model_takes_the_encoder_and_its_numerics(name: str, variant: str, tmp_path: Path) -> None:
    base = sf.VARIANTS.get(variant) or sf.VARIANTS["seg_t_deit_mask_16"].replace(embed_dim=384, num_heads=6)
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": base.patch_size}
    theirs = build(name, **sizes, image_size=4 * base.patch_size, **({"mlp_ratio": 4} if "dinov2" in name else {}))
    theirs.save_pretrained(tmp_path)
    fields = {"depth": 2, "num_classes": 4, "image_size": 4 * base.patch_size}
    sources: list[Any] = [tmp_path, tmp_path / "model.safetensors", theirs.state_dict()]
    for source in sources:
        ours = sf.create_model(base, pretrained=source, **fields)
        assert ours.training
        assert (ours.config.num_classes, ours.config.decoder) == (4, base.decoder)
        if name != "dinov3" or source is tmp_path:
            patch = base.patch_size
            assert_same_features(ours, theirs, [(4 * patch, 4 * patch), (2 * patch, 5 * patch)])


def test_mean_and_std_are_the_preprocessors(tmp_path: Path) -> None:
    build("vit").save_pretrained(tmp_path)
    assert sf.load(tmp_path).config.mean == (0.5, 0.5, 0.5)
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    config = sf.load(tmp_path).config
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert sf.load(tmp_path, mean=(0.0, 0.0, 0.0)).config.mean == (0.0, 0.0, 0.0)


def test_a_pickled_model_of_transformers(tmp_path: Path) -> None:
    model = build("dinov2")
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert_same_features(sf.load(tmp_path), model)


def test_a_hub_id_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, repository = "0" * 40, tmp_path / "models--org--name"
    model = build("dinov2_registers")
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    with pytest.warns(UserWarning, match="org/name is a backbone"):
        assert_same_features(sf.load("org/name"), model)
    with pytest.warns(UserWarning, match="org/name is a backbone"):
        assert_same_features(sf.Segmenter.from_pretrained("org/name"), model)
    with pytest.raises(CheckpointError, match="org/name holds another model than seg_s_mask_16: patch_size is 8, not"):
        sf.create_model("seg_s_mask_16", pretrained="org/name")
    with pytest.raises(
        CheckpointError, match="org/other is no file or folder, nor does the Hugging Face Hub give org/other"
    ):
        sf.create_model("seg_s_mask_16", pretrained="org/other")
    with pytest.raises(FileNotFoundError, match=r"org/other\.pth: no such file"):
        sf.create_model("seg_s_mask_16", pretrained="org/other.pth")
    shutil.rmtree(repository)


class Offset(transformers.Dinov2Model):
    """Meta's DINOv2: positions resized by scale factors for 0.1 patches more, width and height the other way round."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings.interpolate_pos_encoding = self.interpolated

    def interpolated(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        positions = self.embeddings.position_embeddings
        count, side = positions.shape[1] - 1, int((positions.shape[1] - 1) ** 0.5)
        if embeddings.shape[1] - 1 == count and height == width:
            return positions
        scales = [float(pixels // self.config.patch_size + 0.1) / side for pixels in (height, width)]
        patches = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, scale_factor=scales, mode="bicubic")
        return torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def metas_names(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    encoder = {key.removeprefix("encoder."): value for key, value in ours.items() if key.startswith("encoder.")}
    return {**encoder, "mask_token": torch.zeros(1, 64)}


def test_metas_file_gives_metas_features_and_others_the_others() -> None:
    theirs = build("dinov2")
    meta = Offset(theirs.config).eval()
    meta.load_state_dict(theirs.state_dict())
    ours = sf.load(theirs.state_dict(), num_heads=2, decoder_num_heads=2)
    config = ours.config.replace(pos_embed_mode="bilinear")
    from_meta = sf.create_model(config, pretrained=metas_names(ours.state_dict()))
    assert from_meta.config.pos_embed_mode == "bicubic_offset"
    assert_same_features(from_meta, meta)
    assert_same_features(sf.create_model(config, pretrained=theirs.state_dict()), theirs)
    fields: dict[str, Any] = {"num_heads": 2, "decoder_num_heads": 2, "pos_embed_mode": "bicubic_offset"}
    assert_same_features(sf.load(theirs.state_dict(), **fields), meta)
    with pytest.raises(AssertionError):
        assert_same_features(from_meta, theirs)


@needs_real_weights
@pytest.mark.parametrize("size", [(518, 518), (224, 224), (336, 448)])
def test_real_weights(size: tuple[int, int]) -> None:
    config = transformers.Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)
    theirs = transformers.Dinov2Model(config).eval()
    state = {key: value.float() for key, value in load_file(WEIGHTS).items()}
    for old, new in {"attention.query": "q_proj", "attention.key": "k_proj", "attention.value": "v_proj"}.items():
        state = {key.replace(old, new).replace("output.dense", "o_proj"): value for key, value in state.items()}
    theirs.load_state_dict(state)
    ours = sf.create_model("seg_s_dinov2_linear_14", pretrained=WEIGHTS)
    assert (ours.config.num_register_tokens, ours.config.pos_embed_mode) == (0, "bicubic_grid")
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval().encoder(images), features(theirs, images), rtol=0, atol=2e-5)


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "patch_size": 14, "mlp_ratio": 4}
    state = build("dinov2", **sizes, image_size=56).state_dict()
    with pytest.raises(CheckpointError, match=r"embed_dim is 384, not 768; it fits .*seg_s_dinov2_linear_14"):
        sf.create_model("seg_b_dinov2_linear_14", pretrained=state, num_heads=6)
    build("vit", hidden_act="relu").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="hidden_act must be 'gelu' for mlp='gelu', got 'relu'"):
        sf.load(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "model_type": "beit"}))
    with pytest.raises(CheckpointError, match="model_type 'beit' is none of vit, deit, dinov2, dinov2_with_registers"):
        sf.load(tmp_path)
    state = build("vit").state_dict()
    del state["layers.1.attention.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"Missing key\(s\) in state_dict: \"encoder.blocks.1.attn.qkv.weight\""):
        sf.load(state, num_heads=2, decoder_num_heads=2)
    state = build("vit").state_dict()
    state["embeddings.position_embeddings"] = state["embeddings.position_embeddings"][:, 1:]
    with pytest.raises(CheckpointError, match="35 position_embeddings of patches, beside 1"):
        sf.load(state, num_heads=2)
