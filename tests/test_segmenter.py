"""The model against the oracle: forward, labels, losses, gradients, frozen encoders, refused arguments."""

from __future__ import annotations

import copy

import pytest
import torch

import segmenter_fast as sf
from segmenter_fast.reference import ReferenceSegmenter
from support.models import FAMILIES, SMALL, pair


def small(**fields: object) -> sf.Segmenter:
    return sf.create_model("seg_t_mask_16", **{**SMALL, **fields}).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (50, 71)])
def test_forward_loss_and_gradients_equal_the_oracle(family: str, size: tuple[int, int]) -> None:
    model, reference = pair(family)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    target = torch.randint(0, 5, (2, *size))
    target[:, :5] = 255
    torch.testing.assert_close(model.masks(images), reference.masks(images), rtol=0, atol=1e-10)
    torch.testing.assert_close(model(images), reference(images), rtol=0, atol=1e-10)
    losses = model.loss(images, target), reference.loss(images, target)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-10)
    for loss in losses:
        loss.backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_oracle_has_the_official_memory_layout(batch: int) -> None:
    """Its time is the official program's: masks are a view of ``(B, h w, K)``, and nothing is copied after them."""
    _, reference = pair(next(iter(FAMILIES)), torch.float32)
    images = torch.randn(batch, 3, 50, 71)
    masks = reference.masks(images)
    k, h, w = masks.shape[1:]
    assert masks.stride() == (h * w * k, 1, w * k, k)
    assert masks.is_contiguous(memory_format=torch.channels_last)
    assert reference(images).stride(1) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_segment_is_the_argmax_of_the_logits(family: str) -> None:
    model, _ = pair(family, torch.float32)
    images = torch.randn(2, 3, 50, 71)
    with torch.no_grad():
        labels, logits = model.segment(images), model(images)
        probabilities = model.probabilities(images)
    assert labels.shape == (2, 50, 71)
    assert labels.dtype == torch.uint8
    best = logits.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear].long(), logits.argmax(1)[clear])
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 200), (33, 16)])
def test_any_size_even_below_a_patch(size: tuple[int, int]) -> None:
    model, reference = pair("mask_16")
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(images), reference(images), rtol=0, atol=1e-10)
    assert model.segment(images).shape == (1, *size)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["mask_16", "linear_16"])
def test_masks_and_logits_are_channels_last_to_pytorch(family: str, batch: int) -> None:
    """The official program's strides, in every form; others make ``interpolate`` copy the full-size logits."""
    model, _ = pair(family, torch.float32)
    images = torch.randn(batch, 3, 40, 32)
    with torch.no_grad():
        for form in (model, model.optimize(torch.float32, compile=False)):
            masks, logits = form.masks(images), form(images)
            assert masks.stride() == (masks[0].numel(), 1, masks.shape[3] * masks.shape[1], masks.shape[1])
            assert torch._prims_common.suggest_memory_format(masks) == torch.channels_last
            assert logits.stride(1) == 1


def test_empty_batch() -> None:
    model = small()
    images = torch.randn(0, 3, 32, 32)
    with torch.no_grad():
        assert model(images).shape == (0, 5, 32, 32)
        assert model.segment(images).shape == (0, 32, 32)
        assert model.masks(images).shape == (0, 5, 2, 2)


def test_nan_pixels_make_nan_masks_as_in_the_oracle() -> None:
    model, reference = pair("mask_16", torch.float32)
    images = torch.randn(2, 3, 32, 32)
    images[1, 0, 3, 3] = torch.nan
    with torch.no_grad():
        assert torch.equal(model(images).isnan(), reference(images).isnan())
        assert not model(images)[0].isnan().any()


def test_refusals_name_the_argument() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(1, 4, 32, 32\)"):
        model(torch.randn(1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(3, 32, 32\)"):
        model.segment(torch.randn(3, 32, 32))
    with pytest.raises(TypeError, match=r"images must be floating point.*torch.uint8"):
        model.masks(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"target must be \(1, 32, 32\)"):
        model.loss(torch.randn(1, 3, 32, 32), torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="unknown variant"):
        sf.create_model("seg_q_mask_16")


@pytest.mark.parametrize("family", ["mask_16", "deit_linear", "dinov3"])
def test_compiles_without_a_graph_break(family: str) -> None:
    model, _ = pair(family, torch.float32)
    images, target = torch.randn(2, 3, 32, 40), torch.randint(0, 5, (2, 32, 40))
    torch._dynamo.reset()
    with torch.no_grad():
        segment = torch.compile(model.segment, fullgraph=True, backend="aot_eager")
        assert torch.equal(segment(images), model.segment(images))
        forward = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(forward(images), model(images))
    model.train()
    eager = copy.deepcopy(model)
    torch.manual_seed(1)
    torch.compile(model.loss, fullgraph=True, backend="aot_eager")(images, target).backward()
    torch.manual_seed(1)
    eager.loss(images, target).backward()
    expected = dict(eager.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_dropout_acts_in_training_only() -> None:
    model = small(dropout=0.2, decoder_dropout=0.2, drop_path_rate=0.0)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        evaluated = model(images)
        assert torch.equal(model(images), evaluated)
        assert not torch.equal(model.train()(images), evaluated)


def test_bfloat16_end_to_end() -> None:
    model, reference = pair("mask_16", torch.float32)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(images)
        labels = model.to(torch.bfloat16).segment(images)
    best = expected.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 0.25
    assert clear.float().mean() > 0.5
    assert (labels[clear] == expected.argmax(1)[clear]).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_training_keeps_a_float32_loss(dtype: torch.dtype) -> None:
    model, _ = pair("mask_16", torch.float32)
    images, target = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    with torch.autocast("cpu", dtype=dtype):
        loss = model.loss(images, target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(loss, model.loss(images, target), rtol=0.03, atol=0)


def test_a_frozen_encoder_keeps_its_weights_and_its_mode_while_the_decoder_trains() -> None:
    model = small(drop_path_rate=0.5, dropout=0.2, head_classes=3).train().freeze_encoder()
    assert not model.encoder.training
    assert model.decoder.training
    images, target = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    assert torch.equal(model.encoder(images), model.encoder(images))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model.loss(images, target)
    loss.backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("encoder."), name
    assert not model.eval().train().encoder.training


def test_a_frozen_encoder_keeps_no_activations() -> None:
    model = small().train().freeze_encoder()
    assert not model.encoder(torch.randn(1, 3, 32, 32)).requires_grad
    model.freeze_encoder(False)
    assert model.encoder.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.loss(torch.randn(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long)).backward()
    assert model.encoder.patch_embed.proj.weight.grad is not None


def test_a_thawed_encoder_leaves_the_unused_heads_out_of_training() -> None:
    model = sf.create_model("seg_t_mask_16", **SMALL, head_classes=3, freeze_encoder=True).freeze_encoder(False)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "encoder.head.weight",
        "encoder.head.bias",
    }


@pytest.mark.parametrize("name", sf.VARIANTS)
def test_every_variant_builds_with_the_official_keys(name: str) -> None:
    with torch.device("meta"):
        model = sf.create_model(name, num_classes=19)
        reference = ReferenceSegmenter(model.config)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    assert model.masks(torch.empty(1, 3, 64, 64, device="meta")).shape[1] == 19


def test_a_summed_loss_is_the_mean_times_the_labelled_pixels() -> None:
    model, reference = pair("mask_16")
    images, target = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randint(0, 5, (2, 32, 32))
    target[:, :7] = 255
    for each in (model, reference):
        summed = each.loss(images, target, reduction="sum")
        torch.testing.assert_close(summed, each.loss(images, target) * (target != 255).sum())
    ignored = model.loss(images, torch.full_like(target, 255), reduction="sum")
    ignored.backward()
    assert ignored == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_methods_of_the_model_do_not_show_as_modules_of_the_package() -> None:
    assert not {"optimize", "attention_maps"} & set(dir(sf))
