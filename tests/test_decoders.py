"""The decoders: shapes, scores against the oracle, and the size that masks are upsampled to."""

from __future__ import annotations

import pytest
import torch

import segmenter_fast as sf
from segmenter_fast import reference
from segmenter_fast.decoders import LinearDecoder, MaskTransformer, upsampled_size
from support.models import SMALL

KINDS = {"mask": (MaskTransformer, reference.MaskTransformer), "linear": (LinearDecoder, reference.LinearDecoder)}


def config(**fields: object) -> sf.SegmenterConfig:
    return sf.VARIANTS["seg_t_mask_16"].replace(**{**SMALL, **fields})


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_those_of_the_oracle(kind: str, depth: int) -> None:
    ours, theirs = (cls(config(decoder_depth=depth)).double() for cls in KINDS[kind])
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    theirs.load_state_dict(ours.state_dict())
    patches = torch.randn(2, 6, 128, dtype=torch.float64)
    weights = torch.randn(2, 6, 5, dtype=torch.float64)
    results = []
    for decoder in (ours, theirs):
        given = patches.clone().requires_grad_()
        scores = decoder(given)
        (scores * weights).sum().backward()
        results.append([scores, given.grad, *(parameter.grad for parameter in decoder.parameters())])
    assert results[0][0].shape == (2, 6, 5)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_mask_transformer_projects_patches_and_class_embeddings() -> None:
    decoder = MaskTransformer(config(num_classes=7))
    patches, classes = decoder.projected(torch.randn(3, 4, 128))
    assert patches.shape == (3, 4, 128)
    assert classes.shape == (3, 7, 128)


def test_stochastic_depth_of_the_decoder_is_its_own() -> None:
    decoder = MaskTransformer(config(drop_path_rate=0.1, decoder_depth=3, decoder_drop_path_rate=0.4))
    first, *others = (block.drop_path for block in decoder.blocks)
    assert isinstance(first, torch.nn.Identity)
    assert [drop_path.rate for drop_path in others] == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize(
    ("upsample_to", "size", "expected"),
    [("padded", (32, 48), (32, 48)), ("padded", (33, 1), (48, 16)), ("image", (33, 1), (33, 1))],
)
def test_upsampled_size(upsample_to: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert upsampled_size(config(upsample_to=upsample_to), size) == expected
    assert upsampled_size(config(upsample_to=upsample_to), torch.empty(size).shape) == expected
