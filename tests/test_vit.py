"""The encoder and its layers: shapes, positions, prefix tokens, stochastic depth, rotations; against the oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import segmenter_fast as sf
from segmenter_fast import patches, reference, vit
from support.models import FAMILIES, SMALL, pair


def config(**fields: object) -> sf.SegmenterConfig:
    return sf.VARIANTS["seg_t_mask_16"].replace(**{**SMALL, **fields})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(64, 48), (50, 71)])
def test_features_are_those_of_the_oracle(family: str, size: tuple[int, int]) -> None:
    model, oracle = pair(family)
    patch = model.config.patch_size
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    features = model.encoder(images)
    padded = F.pad(images, (0, -size[1] % patch, 0, -size[0] % patch))
    assert features.shape == (2, -(-size[0] // patch) * -(-size[1] // patch), model.config.embed_dim)
    torch.testing.assert_close(features, oracle.encoder(padded), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got"):
        patches.check_images(torch.zeros(shape))


@pytest.mark.parametrize("uint8", [False, True])
def test_images_of_another_dtype_are_refused(uint8: bool) -> None:
    patches.check_images(torch.zeros(1, 3, 2, 2, dtype=torch.float16), uint8)
    with pytest.raises(TypeError, match=r"images must be .*floating point and normalised, got torch.int32"):
        patches.check_images(torch.zeros(1, 3, 2, 2, dtype=torch.int32), uint8)
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    if uint8:
        patches.check_images(images, uint8)
    else:
        with pytest.raises(TypeError, match=r"got torch.uint8; segmenter_fast.predict takes uint8 images"):
            patches.check_images(images, uint8)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 16), (1, 31)])
def test_padding_adds_zeros_at_the_bottom_and_right(height: int, width: int) -> None:
    images = torch.randn(1, 3, height, width)
    padded = patches.pad_to_patches(images, 16)
    assert [side % 16 for side in padded.shape[2:]] == [0, 0]
    assert max(padded.shape[2] - height, padded.shape[3] - width) < 16
    assert torch.equal(padded[..., :height, :width], images)
    assert not padded[..., height:, :].any()
    assert not padded[..., width:].any()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "bicubic_antialias"])
def test_positions_are_resized_by_mode_and_prefix_entries_stay(mode: str) -> None:
    positions = torch.randn(1, 2 + 3 * 4, 8)
    resized = vit.resize_positions(positions, (3, 4), (5, 2), mode)
    assert resized.shape == (1, 2 + 5 * 2, 8)
    assert torch.equal(resized[:, :2], positions[:, :2])
    grid = positions[0, 2:].T.reshape(1, 8, 3, 4)
    kind, antialias = mode.removesuffix("_antialias"), mode.endswith("antialias")
    expected = F.interpolate(grid, size=(5, 2), mode=kind, align_corners=False, antialias=antialias)
    torch.testing.assert_close(resized[0, 2:].T.reshape(1, 8, 5, 2), expected)
    low = vit.resize_positions(positions.bfloat16(), (3, 4), (5, 2), mode)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), resized, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("mode", "resized"), [("bilinear", False), ("bicubic", False), ("bicubic_antialias", True)])
def test_another_aspect_ratio_of_as_many_patches_resizes_in_timms_mode_only(mode: str, resized: bool) -> None:
    encoder = vit.VisionTransformer(config(image_size=(64, 64), pos_embed_mode=mode))
    torch.nn.init.normal_(encoder.pos_embed)
    _, square, _ = encoder.grid_embeddings(4, 4)
    _, wide, _ = encoder.grid_embeddings(2, 8)
    assert torch.equal(square, encoder.pos_embed[:, 1:])
    assert torch.equal(wide, square) != resized


@pytest.mark.parametrize("in_positions", [True, False])
def test_prefix_tokens_come_first_with_their_positions_if_they_have_any(in_positions: bool) -> None:
    fields = {"distillation_token": True, "num_register_tokens": 3, "pos_embed_prefix": in_positions}
    encoder = vit.VisionTransformer(config(**fields))
    for parameter in (encoder.cls_token, encoder.dist_token, encoder.reg_token, encoder.pos_embed):
        torch.nn.init.normal_(parameter)
    prefix, positions, rotation = encoder.grid_embeddings(2, 2)
    assert rotation is None
    expected = torch.cat([encoder.cls_token, encoder.dist_token, encoder.reg_token], 1)
    if in_positions:
        expected = expected + encoder.pos_embed[:, :5]
    assert torch.equal(prefix, expected)
    assert torch.equal(positions, encoder.pos_embed[:, -4:])
    tokens, _ = encoder.embed(torch.zeros(2, 3, 32, 32))
    assert tokens.shape == (2, 5 + 4, 128)
    assert torch.equal(tokens[:, :5], prefix.expand(2, -1, -1))


def test_an_encoder_without_prefix_tokens() -> None:
    encoder = vit.VisionTransformer(config(class_token=False))
    prefix, positions, _ = encoder.grid_embeddings(2, 3)
    assert prefix.shape == (1, 0, 128)
    assert positions.shape == (1, 6, 128)
    assert encoder(torch.zeros(2, 3, 32, 48)).shape == (2, 6, 128)


def test_stochastic_depth_rises_and_acts_in_training_only() -> None:
    model = sf.create_model("seg_t_mask_16", **{**SMALL, "drop_path_rate": 0.4, "depth": 5}).eval()
    first, *others = (block.drop_path for block in model.encoder.blocks)
    assert isinstance(first, torch.nn.Identity)
    assert [drop_path.rate for drop_path in others] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        model.train()
        assert not torch.equal(model(images), model(images))


def test_stochastic_depth_keeps_the_expectation() -> None:
    dropped = vit.DropPath(0.25)(torch.ones(20000, 1, 1))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("kind", "oracle"), [(vit.Mlp, reference.Mlp), (vit.SwiGlu, reference.SwiGlu)])
def test_feed_forward_layers_are_those_of_the_oracle(kind: type, oracle: type) -> None:
    layer, expected = kind(16, 24, 0.0).double(), oracle(16, 24).double()
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), expected(x), rtol=0, atol=1e-12)


def test_the_hidden_width_of_swiglu_is_a_multiple_of_8() -> None:
    block = vit.Block(config(mlp="swiglu", mlp_ratio=2.7), 0.0)
    assert block.mlp.fc1_g.out_features == block.mlp.fc1_x.out_features == block.mlp.fc2.in_features == 352  # above 345


def test_attention_dropout_keeps_the_expectation() -> None:
    attention = vit.Attention(64, 2, dropout=0.1).double()
    x = torch.randn(1, 5, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = attention.eval()(x)
        dropped = attention.train()(x.expand(20000, -1, -1))
    assert dropped.std(0).min() > 1e-3
    torch.testing.assert_close(dropped.mean(0, keepdim=True), expected, rtol=0, atol=0.01)


def test_rotations_depend_on_the_place_within_the_image_only() -> None:
    model, _ = pair("dinov3")
    prefix, positions, table = model.encoder.grid_embeddings(2, 2)
    _, _, larger = model.encoder.grid_embeddings(6, 6)
    count = model.config.num_prefix_tokens
    assert positions is None
    assert torch.equal(prefix, torch.cat([model.encoder.cls_token, model.encoder.reg_token], 1))
    assert torch.equal(table[0, :count], torch.ones(count, 64, dtype=torch.float64))
    # The centre of patch (0, 1) of 2 x 2 is that of patch (1, 4) of 6 x 6.
    torch.testing.assert_close(table[:, count + 1], larger[:, count + 10], rtol=0, atol=1e-14)


def test_a_rotation_turns_queries_and_keys_as_the_oracles_does() -> None:
    rotary = sf.VARIANTS["seg_s_dinov3_mask_16"].replace(**SMALL)
    count = rotary.num_prefix_tokens
    qkv = torch.randn(2, count + 6, 3, 2, 64, dtype=torch.float64)
    table = vit.rotation_table(vit.rotation_angles((2, 3), count, 64, rotary.rope_temperature, qkv))
    turned = vit.rotate(qkv, table)
    oracle = reference.Rotation(rotary, 2, 3, torch.float64)
    for index in range(2):
        expected = oracle(qkv[:, :, index].transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(turned[:, :, index], expected, rtol=0, atol=1e-12)
    assert torch.equal(turned[:, :, 2], qkv[:, :, 2])
    assert vit.rotation_angles((2, 3), count, 64, 100.0, qkv.bfloat16()).dtype == torch.float32


def test_classification_heads_load_and_are_not_trained() -> None:
    model = sf.create_model("seg_t_mask_16", **SMALL, head_classes=7)
    heads = {"encoder.head.weight", "encoder.head.bias"}
    assert heads <= set(model.state_dict())
    assert not model.encoder.head.weight.requires_grad
    without = sf.create_model(model.config, head_classes=0)
    assert set(model.state_dict()) - set(without.state_dict()) == heads


def test_patches_by_a_matrix_product() -> None:
    images, weight, bias = torch.randn(2, 3, 8, 12), torch.randn(5, 3, 4, 4), torch.randn(5)
    ours, expected = (f(images, weight, bias) for f in (patches.multiply_patches, patches.project_patches))
    torch.testing.assert_close(ours, expected)
