"""Models with token merging: exact without it, groups, thresholds, rotary positions, gradients, forms."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast import TokenMerging
from segmenter_fast.kernels import reference
from segmenter_fast.merging import run_blocks
from segmenter_fast.segmenter import Segmenter
from segmenter_fast.visualize import draw_groups

SMALL: dict[str, Any] = {"depth": 4, "decoder_depth": 1, "num_classes": 5, "image_size": 64}
MERGING = TokenMerging((1, 2), 0.3)
ADAPTIVE = TokenMerging((1, 2), threshold=0.7)
VARIANTS = ("seg_t_mask_16", "seg_t_linear_16", "seg_s_deit_mask_16", "seg_s_dinov2_mask_14", "seg_s_dinov3_mask_16")


def made(variant: str = "seg_t_mask_16", **fields: Any) -> Segmenter:
    torch.manual_seed(0)
    model = sf.create_model(variant, **{**SMALL, **fields}).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # larger than at initialisation: every layer changes the tokens
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def images(batch: int = 2, height: int = 70, width: int = 95) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(batch, 3, 3, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return fine + 0.1 * torch.randn(fine.shape, generator=generator)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_share_of_0_is_exact_and_none_gives_the_same_bits(variant: str) -> None:
    model, given = made(variant), images()
    exact = model.masks(given)
    zero = model.with_merging(TokenMerging((0, 2), 0.0))
    torch.testing.assert_close(zero.masks(given), exact, rtol=0, atol=1e-5)
    assert torch.equal(model.with_merging(None).masks(given), exact)
    never = model.with_merging(TokenMerging((0, 2), threshold=0.9999999))
    torch.testing.assert_close(never.masks(given), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("merging", [MERGING, ADAPTIVE, TokenMerging((0, 2), 0.4, matching="window")])
def test_every_encoder_merges(variant: str, merging: TokenMerging) -> None:
    model, given = made(variant).with_merging(merging), images()
    features, groups = model.encoder.merged(given)
    assert groups is not None
    patch = model.config.patch_size
    grid = -(-70 // patch), -(-95 // patch)
    assert groups.index.shape == (2, *grid)
    assert features.shape[1] < grid[0] * grid[1]
    for index, bias in zip(groups.index, groups.bias, strict=True):
        sizes = index.flatten().bincount(minlength=len(bias))
        torch.testing.assert_close(bias.exp(), sizes.float())
    masks = model.masks(given)
    assert masks.shape == (2, 5, *grid)
    assert masks.isfinite().all()
    one = groups.index[0] == groups.index[0].flatten().mode().values  # the largest group: one row of scores
    assert len(masks[0, :, one].unique(dim=1).T) == 1
    labels = model.segment(given)
    assert torch.equal(labels, model(given).argmax(1).to(labels.dtype))


def test_static_schedules_remove_the_shares_that_they_name() -> None:
    model = made().with_merging(TokenMerging((1, 3), (0.25, 0.5)))
    features, _ = model.encoder.merged(images(1, 64, 64))
    assert features.shape[1] == model.config.merging.tokens_left(16, 4)[-1] == 6


def test_windows_merge_whole_and_the_most_similar_first() -> None:
    model = made().with_merging(TokenMerging((0,), 0.5, matching="window"))
    given = images(1, 64, 80)
    x, _ = model.encoder.embed(given)
    _, groups = model.encoder.merged(given)
    assert groups is not None
    z = torch.nn.functional.normalize(x[0, 1:], dim=-1).unflatten(0, (4, 5))
    similarity = {}
    for row in range(2):
        for column in range(2):
            window = z[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(0, 1)
            similarity[row, column] = ((window @ window.T).sum().item() - 4) / 12
    merged = sorted(similarity, key=lambda place: -similarity[place])[:3]  # 10 of 20 tokens, 3 by each window
    for row, column in similarity:
        window = groups.index[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert (len(window.unique()) == 1) == ((row, column) in merged)
    assert len(groups.index.unique()) == 20 - 9


@pytest.mark.parametrize("channels", [64, 100, 192, 500])
def test_tokens_are_compared_in_sums_of_channels(channels: int) -> None:
    model, given = made(), images()
    x, _ = model.encoder.embed(given)
    z = model.encoder.blocks[0].norm1(x[:, 1:])
    sums = torch.stack([z[..., first::channels].sum(-1) for first in range(min(channels, 192))], -1)
    z = torch.nn.functional.normalize(sums, dim=-1)
    value, match = reference.best_match(z[:, 1::2], z[:, ::2])
    _, groups = model.with_merging(TokenMerging((0,), 0.3, channels=channels)).encoder.merged(given)
    assert groups is not None
    assert torch.equal(groups.index.flatten(1), reference.bipartite_groups(value, match, 30, 9))
    _, own = model.with_merging(TokenMerging((0,), 0.3)).encoder.merged(given)
    assert own is not None
    assert torch.equal(own.index, groups.index) == (channels >= 192)


def test_a_crowd_merges_first() -> None:
    model, given = made(), images()
    x, _ = model.encoder.embed(given)
    z = torch.nn.functional.normalize(model.encoder.blocks[0].norm1(x[:, 1:]), dim=-1)
    value, match = reference.best_match(z[:, 1::2], z[:, ::2])
    near = torch.einsum("bsd,btd->bst", z[:, 1::2], z).mean(2)  # mean cosine to all tokens
    wanted = reference.bipartite_groups(value + 3 * near, match, 30, 9)
    crowd = TokenMerging((0,), 0.3, crowd=3.0)
    for form in (model.with_merging(crowd), model.optimize(torch.float32, compile=False, merge=crowd)):
        assert torch.equal(form.token_groups(given).flatten(1), wanted)
    assert not torch.equal(reference.bipartite_groups(value, match, 30, 9), wanted)


def test_ragged_batches_give_what_each_image_gives() -> None:
    for variant in ("seg_t_mask_16", "seg_s_dinov3_mask_16"):
        model = made(variant).double().with_merging(TokenMerging((1, 2, 3), threshold=0.6))
        given = torch.cat([images(2), torch.zeros(1, 3, 70, 95), torch.randn(1, 3, 70, 95)]).double()
        given.requires_grad_()
        _, groups = model.encoder.merged(given)
        assert groups is not None
        counts = groups.index.flatten(1).amax(1) + 1
        assert counts.min() < counts.max() == groups.bias.shape[1]
        masks = model.masks(given)
        (gradient,) = torch.autograd.grad(masks.square().sum(), given)
        for index in range(len(given)):
            alone = given[index : index + 1].detach().requires_grad_()
            own = model.masks(alone)
            torch.testing.assert_close(masks[index : index + 1], own, rtol=0, atol=1e-10)
            torch.testing.assert_close(gradient[index : index + 1], torch.autograd.grad(own.square().sum(), alone)[0])


def test_identical_patches_may_merge_without_a_trace() -> None:
    """Groups of equal tokens, with the logarithms of their sizes, attend as the tokens do."""
    model = made("seg_t_linear_16").double()
    tokens = torch.randn(1, 9, 192, dtype=torch.float64)
    tokens[:, 1:] = tokens[:, 1:3].repeat_interleave(4, 1)  # 4 patches of one kind, then 4 of another
    exact, _ = run_blocks(model.encoder.blocks, tokens, None, (2, 4), None)
    merged, groups = run_blocks(model.encoder.blocks, tokens, None, (2, 4), TokenMerging((0, 1), 0.5))
    assert groups is not None
    assert groups.index.flatten().tolist() == [0] * 4 + [1] * 4
    torch.testing.assert_close(groups.spread(merged[:, 1:]), exact[:, 1:], rtol=0, atol=1e-10)


def test_a_group_is_turned_by_the_mean_of_its_patches_angles() -> None:
    model = made("seg_s_dinov3_mask_16").double()
    x, angles = torch.randn(1, 9, 384).double(), torch.randn(9, 64).double()
    seen = []

    def record(x: Tensor, rotation: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(rotation)
        return x

    record.norm1 = torch.nn.LayerNorm(384).double()  # type: ignore[attr-defined]
    _, groups = run_blocks([record, record], x, angles, (2, 4), TokenMerging((1,), 0.5))  # type: ignore[list-item]
    assert groups is not None
    assert seen[0].shape == (2, 9, 64)
    means = torch.stack([angles[1:][groups.index.flatten() == group].mean(0) for group in range(4)])
    torch.testing.assert_close(seen[1][:, 0, 1:], torch.stack([means.cos(), means.sin()]))
    assert model.config.num_prefix_tokens == 5


@pytest.mark.parametrize("merging", [MERGING, ADAPTIVE])
def test_the_inference_form_merges_as_the_model(merging: TokenMerging) -> None:
    model, given = made("seg_s_dinov3_mask_16"), images()
    merged = model.with_merging(merging)
    fast = model.optimize("float32", compile=False, merge=merging)
    for method in ("masks", "probabilities", "forward"):
        torch.testing.assert_close(getattr(fast, method)(given), getattr(merged, method)(given), rtol=0, atol=1e-4)
    assert (fast.segment(given) != merged.segment(given)).float().mean() < 0.01
    assert fast.config.merging == merging
    exact = fast.with_merging("none")
    assert exact is fast.with_merging(None)
    torch.testing.assert_close(exact.masks(given), model.masks(given), rtol=0, atol=1e-4)
    assert exact.with_merging(merging).masks(given).equal(fast.masks(given))
    for other in (copy.deepcopy(fast), copy.deepcopy(exact)):
        assert other.config.merging in (merging, None)
    with pytest.raises(ValueError, match="compile must not be True with a threshold"):
        model.optimize(compile=True, merge=ADAPTIVE)


@pytest.mark.filterwarnings("ignore:int8 gains nothing")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_low_precision_merges(quantize: str | None) -> None:
    model = made()
    fast = model.optimize("bfloat16" if quantize is None else "auto", compile=False, quantize=quantize, merge=MERGING)
    merged, exact = model.with_merging(MERGING).masks(images()), model.masks(images())
    assert (fast.masks(images()) - exact).abs().mean() < 3 * (merged - exact).abs().mean()


def test_compiled_models_are_one_graph() -> None:
    model, given = made().with_merging(MERGING), images()
    compiled = torch.compile(model.masks, fullgraph=True, backend="aot_eager")
    for part in (given, given[:1, :, :48]):
        torch.testing.assert_close(compiled(part), model.masks(part), rtol=0, atol=1e-4)


def test_options_of_load_predict_and_create(tmp_path: Any) -> None:
    model = made()
    model.save_pretrained(tmp_path / "exact")
    model.with_merging("fast").save_pretrained(tmp_path / "merged")
    picture = (images(1)[0].permute(1, 2, 0) * 50 + 128).clamp(0, 255).byte().numpy()
    expected = sf.predict(model.with_merging("fast"), picture).labels
    assert (sf.predict(model, picture).labels != expected).any()
    for other in (
        sf.load(tmp_path / "merged"),
        sf.load(tmp_path / "exact", merge="fast"),
        sf.load(
            tmp_path / "exact",
            merge={
                "layers": [1, 2, 3],
                "share": list(model.with_merging("fast").config.merging.shares),
                "channels": 128,
                "crowd": 0.1,
            },
        ),
    ):
        assert other.config.merging == model.with_merging("fast").config.merging
        assert (sf.predict(other, picture).labels == expected).all()
        assert (sf.predict(other, picture, merge="none").labels == sf.predict(model, picture).labels).all()
    assert (sf.predict(model, [picture], merge="fast")[0].labels == expected).all()
    assert sf.load(tmp_path / "merged", merge="none").config.merging is None
    assert sf.create_model(model.config, merging=MERGING).encoder.merging == MERGING
    assert model.config.merging is model.encoder.merging is None
    with pytest.raises(ValueError, match="did you mean fast"):
        sf.load(tmp_path / "exact", merge="fats")


def test_training_with_merging_moves_every_parameter() -> None:
    model = made(dropout=0.1, decoder_dropout=0.1).with_merging(MERGING).train()
    model.loss(images(), torch.randint(5, (2, 70, 95))).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_attention_maps_refuse_merged_patches() -> None:
    with pytest.raises(ValueError, match=r"this model merges patches.*with_merging\(None\)"):
        made().with_merging("fast").attention_maps(images(), 0)


def test_groups_are_drawn_in_their_mean_colours() -> None:
    model, given = made().with_merging(MERGING), images(1)
    index = model.token_groups(given)
    assert torch.equal(index, model.encoder.merged(given)[1].index)
    exact = model.with_merging(None).token_groups(given)
    assert exact.flatten(1).tolist() == [list(range(5 * 6))]
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[:, :2], pixels[:, 2:4], pixels[:, 4] = 90, 30, 200
    for image, index in ((pixels, np.zeros((3, 2), int)), (pixels[..., 0], np.zeros((2, 3), int))):
        with pytest.raises(ValueError, match=r"image and index must be \(H, W, 3\) and \(H / 2, W / 2\), got"):
            draw_groups(image, index, 2)
    drawn = np.asarray(draw_groups(pixels, np.array([[0, 0, 1], [0, 0, 1]]), 2))
    assert (drawn[:, :4] == 60).all()
    assert (drawn[:, 4] == 200 // 3).all()  # a line
