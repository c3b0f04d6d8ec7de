"""The inference form gives the model's results: compiled, copied, pickled, loaded into, in low precision."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast import devices
from segmenter_fast.reference import ReferenceSegmenter
from support.models import FAMILIES, normalised, pair

COLOURS = torch.tensor([[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]]).float()


def images_of(model: sf.Segmenter, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The same images as uint8 and normalised."""
    pixels = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
    return pixels, normalised(model, pixels)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (50, 71)])
def test_equals_the_model_in_float32(family: str, size: tuple[int, int]) -> None:
    model, _ = pair(family, torch.float32)
    fast = model.optimize(torch.float32, compile=False)
    pixels, images = images_of(model, 2, *size)
    with torch.no_grad():
        expected = model(images)
        for given in (images, pixels):
            torch.testing.assert_close(fast(given), expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(fast.masks(images), model.masks(images), rtol=0, atol=2e-4)
        torch.testing.assert_close(fast.probabilities(images), model.probabilities(images), rtol=0, atol=1e-4)
        best = expected.topk(2, dim=1).values
        clear = best[:, 0] - best[:, 1] > 1e-3
        assert torch.equal(fast.segment(images)[clear], model.segment(images)[clear])


@pytest.mark.parametrize("family", ["mask_16", "linear_16", "deit_mask", "registers", "dinov3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_accurate_as_the_oracle_in_that_dtype(family: str, dtype: torch.dtype) -> None:
    model, _ = pair(family, torch.float32)
    oracle = ReferenceSegmenter(model.config).double()
    oracle.load_state_dict(model.state_dict())
    pixels, images = images_of(model, 2, 64, 64)
    with torch.no_grad():
        expected = oracle(images.double())
        peer = ReferenceSegmenter(model.config).to(dtype)
        peer.load_state_dict(model.state_dict())
        allowed = (peer(images.to(dtype)).double() - expected).square().mean().sqrt()
        fast = model.optimize(dtype, compile=False)
        for given in (images, pixels):
            assert (fast(given).double() - expected).square().mean().sqrt() <= 2 * allowed


@pytest.mark.parametrize("family", ["mask_16", "dinov3"])
def test_compiled_in_one_graph_and_again_for_another_batch(family: str) -> None:
    model, _ = pair(family, torch.float32)
    fast = model.optimize(torch.float32, compile=True)
    for batch in (1, 2, 5):
        pixels, images = images_of(model, batch, 40, 32)
        with torch.no_grad():
            torch.testing.assert_close(fast(pixels), model(images), rtol=0, atol=2e-4)


def test_compiles_for_many_image_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second size on, the compiler represents height and width by symbols."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = sf.create_model("seg_t_linear_16", image_size=32, num_classes=2, depth=1).eval()
    fast = model.optimize(torch.float32, compile=True)
    with torch.no_grad():
        for size in ((32, 40), (48, 56), (128, 33)):
            images = torch.randn(1, 3, *size)
            torch.testing.assert_close(fast(images), model(images), rtol=0, atol=2e-4)


def test_many_models_compile_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's limit of recompilations applies to each model, not to all together."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    images = torch.randn(1, 3, 16, 16)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        model = sf.create_model("seg_t_linear_16", image_size=16, num_classes=2, depth=1).eval()
        with torch.no_grad():
            found, expected = model.optimize(torch.float32).masks(images), model.masks(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_original_model_is_unchanged() -> None:
    model, _ = pair("mask_16", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = model.train().optimize(torch.bfloat16, compile=False)
    assert model.training
    assert not fast.training
    assert not fast.train().training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert set(fast.state_dict()) == set(before)


def test_scores_stay_float32() -> None:
    model, _ = pair("mask_16", torch.float32)
    fast = model.optimize(torch.bfloat16, compile=False)
    assert fast.decoder.mask_norm.weight.dtype == torch.float32
    assert fast.masks(torch.randn(1, 3, 32, 32)).dtype == torch.float32
    assert fast.to(torch.float16).decoder.mask_norm.weight.dtype == torch.float32
    assert fast.encoder.norm.weight.dtype == torch.float16


def test_copies_pickles_and_later_weights() -> None:
    model, _ = pair("mask_16", torch.float32)
    other, _ = pair("mask_16", torch.float32)
    fast = model.optimize(torch.float32, compile=False)
    pixels, images = images_of(model, 1, 48, 32)
    with torch.no_grad():
        expected = fast(pixels)
        assert torch.equal(copy.deepcopy(fast)(pixels), expected)
        assert torch.equal(pickle.loads(pickle.dumps(fast))(pixels), expected)
        fast.load_state_dict(other.state_dict())
        torch.testing.assert_close(fast(pixels), other(images), rtol=0, atol=2e-4)
        assert not torch.allclose(fast(pixels), expected, atol=1e-2)
        torch.testing.assert_close(fast.to(torch.bfloat16)(pixels), other(images), rtol=0, atol=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_without_units_stores_linear_weights_in_the_dtype_and_computes_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cpu_is_fast_in_bfloat16", "cpu_is_fast_in_float16"):
        monkeypatch.setattr(devices, name, lambda: False)
    devices.warn_of_slow_dtype.cache_clear()
    model, _ = pair("mask_16", torch.float32)
    with pytest.warns(UserWarning, match=r"this CPU \(.*\) has no b?float16 units: .* dtype='auto' takes float32"):
        fast = model.optimize(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.optimize(dtype)
        assert model.optimize().encoder.blocks[0].attn.qkv.weight.dtype == torch.float32
    rounded = copy.deepcopy(model)
    for part in (rounded.encoder.blocks, rounded.decoder):
        for module in part.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(dtype).float()
    pixels, images = images_of(model, 2, 48, 32)
    with torch.no_grad():
        for form in (fast, pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(form(pixels), rounded(images), rtol=0, atol=2e-4)
    assert fast.encoder.blocks[0].mlp.fc1.weight.dtype == fast.decoder.proj_dec.weight.dtype == dtype
    assert sum(p.nbytes for p in fast.parameters()) < 0.6 * sum(p.nbytes for p in model.parameters())


def test_takes_the_models_place_in_prediction() -> None:
    model, _ = pair("mask_16", torch.float32)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    fast = model.optimize(torch.float32, compile=False)
    ours, expected = sf.predict(fast, image).labels, sf.predict(model, image).labels
    assert (ours == expected).mean() > 0.99


def test_refusals() -> None:
    model, _ = pair("mask_16", torch.float32)
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float32, .* got torch\.int8"):
        model.optimize(torch.int8)
    with pytest.raises(ValueError, match="compile must be True, False or 'auto', got 'always'"):
        model.optimize(compile="always")
    fast = model.optimize(compile=False)
    with pytest.raises(NotImplementedError, match="cannot be trained"):
        fast.loss(torch.randn(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(1, 4, 32, 32\)"):
        fast(torch.randn(1, 4, 32, 32))
    with pytest.raises(TypeError, match=r"images must be uint8, or floating point.*int64"):
        fast(torch.zeros(1, 3, 32, 32, dtype=torch.long))
    assert fast.segment(torch.zeros(0, 3, 32, 32)).shape == (0, 32, 32)


def scenes(count: int, cell: int, side: int = 128) -> tuple[Tensor, Tensor]:
    """Coloured squares with noise, and their classes."""
    target = torch.randint(0, 5, (count, side // cell, side // cell))
    target = target.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    images = COLOURS[target].permute(0, 3, 1, 2)
    return images + 0.3 * torch.randn_like(images), target


@functools.cache
def trained(family: str) -> sf.Segmenter:
    """A model of the family after a few training steps on scenes, well above chance."""
    torch.manual_seed(0)
    model = sf.create_model(pair(family)[0].config, drop_path_rate=0.0)
    cell = 2 * model.config.patch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        loss = model.loss(*scenes(4, cell, 4 * cell))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_labels_of_trained_models_agree_except_for_ties_within_rounding(family: str, dtype: torch.dtype) -> None:
    with torch.enable_grad():
        model = trained(family)
    images, target = scenes(4, 2 * model.config.patch_size, 8 * model.config.patch_size)
    reference = ReferenceSegmenter(model.config).eval()
    reference.load_state_dict(model.state_dict())
    logits = reference(images)
    fast = model.optimize(dtype, compile=False)
    labels, error = fast.segment(images).long(), (fast(images).float() - logits).abs().max()
    assert (logits.argmax(1) == target).float().mean() > 0.5, "the model has not learned anything"
    differ = labels != logits.argmax(1)
    assert differ.float().mean() < 0.01
    margin = logits.amax(1) - logits.gather(1, labels[:, None])[:, 0]
    assert (margin[differ] <= 2 * error).all()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mask_16", "dinov3"])
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graphs_replay_and_are_bounded(compile: bool, family: str) -> None:
    model, _ = pair(family, torch.float32)
    model = model.cuda()
    fast = model.optimize(torch.float32, compile=compile, cuda_graph=True)
    with torch.no_grad():
        # Each side is compiled for tens of seconds, or not at all.
        for side in (32, 48, 32) if compile else (32, 48, 64, 80, 96, 112, 128, 144, 160, 32):
            images = torch.randn(1, 3, side, side, device="cuda")
            torch.testing.assert_close(fast(images), model(images), rtol=0, atol=5e-3)
    assert len(fast._graphs) == (2 if compile else 8)
