"""Building a model: keys that do not fit are listed; resized and re-initialised tensors."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast.weights.build import SavedModel, build
from segmenter_fast.weights.reading import CheckpointError
from support.checkpoints import SMALL, same, small_model

IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def saved_model(**fields: object) -> SavedModel:
    return SavedModel("here.pth", SMALL.replace(**fields), small_model(**fields).state_dict())


def test_a_built_model_is_whole() -> None:
    given = saved_model(head_classes=4)
    model = build(sf.Segmenter, given, {})
    assert same(model.state_dict(), dict(given.state))
    assert not model.training
    assert all(not tensor.is_meta and tensor.is_contiguous() for tensor in (*model.parameters(), *model.buffers()))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.head.weight", "encoder.head.bias"}
    model.train().loss(IMAGES, torch.zeros(1, 32, 32, dtype=torch.long)).backward()
    assert model.encoder.cls_token.grad is not None


def test_nothing_is_shared_with_the_source() -> None:
    given = saved_model()
    before = {key: tensor.clone() for key, tensor in given.state.items()}
    with torch.no_grad():
        for parameter in build(sf.Segmenter, given, {}).parameters():
            parameter.zero_()
    assert same(dict(given.state), before)


def test_other_precisions_become_float32() -> None:
    given = saved_model()
    halves = SavedModel("half", given.config, {key: tensor.bfloat16() for key, tensor in given.state.items()})
    model = build(sf.Segmenter, halves, {})
    assert same(model.state_dict(), {key: tensor.float() for key, tensor in halves.state.items()})


def test_all_keys_that_do_not_fit_are_listed_at_once() -> None:
    given = saved_model()
    state = dict(given.state)
    del state["encoder.cls_token"], state["decoder.proj_dec.bias"]
    state |= {"decoder.extra": torch.ones(2, 3), "encoder.norm.weight": torch.ones(5)}
    with pytest.raises(CheckpointError) as caught:
        build(sf.Segmenter, SavedModel("here.pth", given.config, state), {})
    assert str(caught.value).splitlines() == [
        "here.pth does not fit its configuration:",
        '\tMissing key(s) in state_dict: "encoder.cls_token", "decoder.proj_dec.bias". ',
        '\tUnexpected key(s) in state_dict: "decoder.extra". ',
        "\tsize mismatch for encoder.norm.weight: copying a param with shape torch.Size([5]) from checkpoint, the "
        "shape in current model is torch.Size([64]).",
    ]


@pytest.mark.parametrize("value", [torch.ones(64, dtype=torch.int64), torch.ones(64).to_sparse()])
def test_a_tensor_that_is_no_weight_is_named(value: Tensor) -> None:
    given = saved_model()
    state = {**given.state, "encoder.norm.weight": value}
    with pytest.raises(CheckpointError, match=r"here\.pth: encoder\.norm\.weight must be a dense floating point"):
        build(sf.Segmenter, SavedModel("here.pth", given.config, state), {})


def test_a_field_out_of_range_names_the_source() -> None:
    with pytest.raises(CheckpointError, match=r"here\.pth: num_heads must be a divisor"):
        build(sf.Segmenter, saved_model(), {"num_heads": 5})
    with pytest.raises(TypeError, match="unknown configuration field colour"):
        build(sf.Segmenter, saved_model(), {"colour": 1})


@pytest.mark.parametrize("decoder", ["mask", "linear"])
@pytest.mark.parametrize("num_classes", [1, 5])
def test_another_class_count_reinitialises_the_tensors_of_the_classes(decoder: str, num_classes: int) -> None:
    given = saved_model(decoder=decoder, class_names=("a", "b", "c"), palette=((0, 0, 0),) * 3)
    names = {
        "mask": ["decoder.cls_emb", "decoder.mask_norm.weight", "decoder.mask_norm.bias"],
        "linear": ["decoder.head.weight", "decoder.head.bias"],
    }[decoder]
    wanted = rf"here\.pth has 3 classes, not {num_classes}: {', '.join(names)} are"
    with pytest.warns(UserWarning, match=wanted):
        model = build(sf.Segmenter, given, {"num_classes": num_classes})
    assert model(IMAGES).shape == (1, num_classes, 32, 32)
    assert (model.config.class_names, model.config.palette) == ((), ())
    state = model.state_dict()
    kept = state.keys() - set(names)
    assert kept == given.state.keys() - set(names)
    assert same({key: state[key] for key in kept}, {key: given.state[key] for key in kept})
    assert 0 < state[names[0]].std() < 0.04  # truncated normal of 0.02


def test_the_same_class_count_reinitialises_nothing() -> None:
    given = saved_model(class_names=("a", "b", "c"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(sf.Segmenter, given, {"num_classes": 3})
    assert same(model.state_dict(), dict(given.state))
    assert model.config.class_names == ("a", "b", "c")


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("distilled", [False, True])
def test_another_image_size_resizes_the_position_embedding(mode: str, distilled: bool) -> None:
    given = saved_model(pos_embed_mode=mode, distillation_token=distilled)
    model = build(sf.Segmenter, given, {"image_size": (48, 64)})
    before, after = given.state["encoder.pos_embed"], model.encoder.pos_embed
    prefix = 1 + distilled
    assert torch.equal(after[:, :prefix], before[:, :prefix])
    grid = before[:, prefix:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(6, 8), mode=mode, align_corners=False).permute(0, 2, 3, 1).reshape(1, 48, 64)
    torch.testing.assert_close(after[:, prefix:], resized)
    # an image of this size needs no resizing at run time, and gives the same
    images = torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(model(images), build(sf.Segmenter, given, {})(images))


def test_a_position_embedding_of_another_size_than_configured_is_misshapen() -> None:
    given = saved_model()
    wrong = SavedModel("here.pth", given.config.replace(image_size=40), given.state)
    for image_size in (40, 64):
        with pytest.raises(
            CheckpointError, match=r"size mismatch for encoder\.pos_embed: .* shape torch\.Size\(\[1, 17, 64\]\)"
        ):
            build(sf.Segmenter, wrong, {"image_size": image_size})


def test_an_absurd_size_takes_no_memory() -> None:
    given = saved_model()
    huge = SavedModel("here.pth", given.config.replace(embed_dim=1 << 17, num_heads=1 << 11), given.state)
    with pytest.raises(CheckpointError, match="size mismatch"):
        build(sf.Segmenter, huge, {})
