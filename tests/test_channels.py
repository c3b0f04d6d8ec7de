"""Models of other channels than RGB: weights, configuration, every form of inference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models._manipulate import adapt_input_conv

import segmenter_fast as sf
from segmenter_fast import patches
from segmenter_fast.export import export
from segmenter_fast.reference import ReferenceSegmenter
from segmenter_fast.weights.build import adapt_channels
from segmenter_fast.weights.reading import CheckpointError
from support.models import normalised, windowed

COUNTS = (1, 2, 4, 8)


def images(channels: int, size: tuple[int, int] = (40, 56)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(0, 256, (2, channels, *size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("channels", COUNTS)
def test_weights_of_rgb_are_adapted_as_timm_does(channels: int) -> None:
    weight = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = adapt_input_conv(channels, weight.clone())
    assert torch.equal(adapt_channels(weight, channels, "it"), expected)


@pytest.mark.parametrize("channels", COUNTS)
def test_a_checkpoint_takes_other_channels_and_is_saved_with_them(channels: int, tmp_path: Path) -> None:
    rgb = windowed(mean=(0.1, 0.2, 0.6), std=(0.5, 0.25, 0.125))
    rgb.save_pretrained(tmp_path / "rgb")
    with pytest.warns(UserWarning, match=f"adapted from 3 channels to {channels} and needs training"):
        model = sf.load(tmp_path / "rgb", in_channels=channels)
    expected = adapt_input_conv(channels, rgb.encoder.patch_embed.proj.weight.detach().clone())
    assert torch.equal(model.encoder.patch_embed.proj.weight, expected)
    mean = {1: (0.3,), 2: (0.1, 0.2), 4: (0.1, 0.2, 0.6, 0.1), 8: (0.1, 0.2, 0.6) * 2 + (0.1, 0.2)}[channels]
    assert model.config.mean == pytest.approx(mean)
    model.save_pretrained(tmp_path / "own")
    own = sf.load(tmp_path / "own")
    assert own.config == model.config
    assert own.config.in_channels == channels
    assert torch.equal(own.segment(normalised(own, images(channels))), model.segment(normalised(own, images(channels))))
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.warns(UserWarning, match="without a configuration"):
        bare = sf.load(tmp_path / "bare.pth", num_heads=2)
    assert (bare.config.in_channels, len(bare.config.mean)) == (channels, channels)
    with pytest.raises(CheckpointError, match=f"takes images of {channels} channels, which cannot become 5"):
        sf.load(tmp_path / "own", in_channels=5)


def test_one_channel_gives_what_grey_as_rgb_gives() -> None:
    rgb = windowed().eval()
    grey = sf.create_model(rgb.config, pretrained=rgb.state_dict(), in_channels=1).eval()
    one = normalised(grey, images(1))
    torch.testing.assert_close(grey.masks(one), rgb.masks(one.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_encoder_weights_of_timm_are_adapted() -> None:
    config = windowed().config
    encoder = sf.create_model(config).encoder.state_dict()
    model = sf.create_model(config, pretrained=encoder, in_channels=4, mean=(0.1,) * 4)
    assert torch.equal(
        model.encoder.patch_embed.proj.weight, adapt_input_conv(4, encoder["patch_embed.proj.weight"].clone())
    )
    assert model.config.mean == (0.1,) * 4
    again = sf.create_model(config, pretrained=model.encoder.state_dict(), in_channels=4)
    assert torch.equal(again.encoder.patch_embed.proj.weight, model.encoder.patch_embed.proj.weight)


@pytest.mark.parametrize("channels", COUNTS)
def test_every_form_gives_the_labels_of_the_reference(channels: int, tmp_path: Path) -> None:
    model = windowed(in_channels=channels).eval()
    pixels = images(channels)
    reference = ReferenceSegmenter(model.config).eval()
    reference.load_state_dict(model.state_dict(), strict=True)
    given = normalised(model, pixels)
    with torch.no_grad():
        expected = reference.segment(given)
        masks = reference.masks(given)
    assert torch.equal(model.segment(given), expected)
    fast = model.optimize("float32", compile=False)
    for source in (given, pixels):
        torch.testing.assert_close(fast.masks(source), masks, rtol=1e-3, atol=1e-3)
    torch.manual_seed(0)
    plain = sf.create_model(model.config).eval()  # small weights, which amplify no rounding
    exact = plain.masks(given)
    for options in ({"dtype": "bfloat16"}, {"dtype": "float32", "quantize": "int8"}):
        masks = plain.optimize(compile=False, **options).masks(pixels).float()
        assert (masks - exact).abs().mean() < 0.1 * exact.abs().mean(), options
    weight = model.encoder.patch_embed.proj.weight
    product = patches.multiply_patches(patches.pad_to_patches(given, 16), weight, None)
    convolved = torch.nn.functional.conv2d(patches.pad_to_patches(given, 16), weight, stride=16)
    torch.testing.assert_close(product, convolved, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=rf"images must be \(B, {channels}, H, W\), got \(1, 3, 32, 32\)"):
        fast.segment(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_an_exported_file_takes_four_channels(tmp_path: Path) -> None:
    import onnxruntime

    model = windowed(in_channels=4).eval()
    export(model, tmp_path / "four.onnx", size=(32, 48), batch_size=2, uint8=True)
    pixels = images(4, (32, 48))
    (labels,) = onnxruntime.InferenceSession(tmp_path / "four.onnx").run(None, {"images": pixels.numpy()})
    assert (torch.from_numpy(labels) == model.segment(normalised(model, pixels))).float().mean() > 0.999


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"in_channels": 4}, "mean must be 4 numbers, as in_channels is 4"),
        ({"bands": (4, 3)}, "bands must be empty, or 3 bands counted from 1"),
        ({"bands": (0, 1, 2)}, "bands must be empty, or 3 bands counted from 1"),
        ({"pixel_scale": 0.0}, "pixel_scale must be positive, got 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.SegmenterConfig.from_dict(fields)
