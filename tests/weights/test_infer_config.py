"""Configurations from the shapes of tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast import VARIANTS, Segmenter
from segmenter_fast.weights.infer_config import fields_from_shapes
from segmenter_fast.weights.reading import CheckpointError
from support.checkpoints import small_model


def shapes_of(name: str, **fields: object) -> dict[str, Tensor]:
    with torch.device("meta"):
        return Segmenter(VARIANTS[name].replace(**fields)).state_dict()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_recognised(name: str) -> None:
    wanted = VARIANTS[name]
    fields = fields_from_shapes(shapes_of(name), {})
    assert fields == {field: getattr(wanted, field) for field in fields}
    assert fields["variant"] == name


@pytest.mark.parametrize("pos_embed_prefix", [True, False])
def test_registers_and_layer_scale_are_recognised(pos_embed_prefix: bool) -> None:
    given = {"num_register_tokens": 4, "pos_embed_prefix": pos_embed_prefix, "layer_scale": True, "head_classes": 5}
    fields = fields_from_shapes(small_model(**given).state_dict(), {})
    assert {field: fields[field] for field in given} == given


def test_a_grid_that_is_no_square_needs_the_image_size() -> None:
    state = small_model(image_size=(24, 40)).state_dict()
    with pytest.raises(CheckpointError, match=r"15 patches.*image_size="):
        fields_from_shapes(state, {})
    assert fields_from_shapes(state, {"image_size": (24, 40)})["image_size"] == (24, 40)


def test_heads_that_are_not_of_64_must_be_given() -> None:
    state = small_model(embed_dim=96, num_heads=3, decoder_num_heads=3).state_dict()
    with pytest.raises(CheckpointError, match=r"96 is no multiple of 64; pass num_heads="):
        fields_from_shapes(state, {})
    assert fields_from_shapes(state, {"num_heads": 3})["decoder_num_heads"] == 3


@pytest.mark.parametrize(
    "key",
    ["encoder.patch_embed.proj.weight", "encoder.pos_embed", "encoder.blocks.0.mlp.fc1.weight", "decoder.cls_emb"],
)
def test_missing_and_misshapen_tensors_are_named(key: str) -> None:
    state = small_model().state_dict()
    misshapen = state | {key: state[key].flatten()}
    with pytest.raises(CheckpointError, match=key):
        fields_from_shapes(misshapen, {})
    del state[key]
    with pytest.raises(CheckpointError, match=r"decoder\.head\.weight" if "decoder" in key else key):
        fields_from_shapes(state, {})


@pytest.mark.filterwarnings("ignore:.*without a configuration")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_shape_gives_another_error(data: st.DataObject) -> None:
    state = small_model(head_classes=4, num_register_tokens=2).state_dict()
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), max_size=3)):
        state[key] = torch.zeros(data.draw(st.lists(st.integers(0, 3), max_size=5)))
    try:
        sf.load(state)
    except CheckpointError as error:
        assert "the state dict" in str(error)  # noqa: PT017
