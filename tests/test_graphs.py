"""CUDA graphs of the inference form, on recorded operators instead of a GPU, and on a GPU where there is one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast import inference_segmenter
from segmenter_fast.graphs import MOST_GRAPHS, Graphs
from segmenter_fast.inference_segmenter import InferenceSegmenter
from support.cuda_graphs import fake_cuda
from support.models import pair
from support.threads import in_threads

RESULTS = ["masks", "segment", "probabilities", "forward"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    captures = InferenceSegmenter._captures
    on_gpu = partial(SimpleNamespace, is_cuda=True)
    monkeypatch.setattr(
        InferenceSegmenter, "_captures", lambda model, images: captures(model, on_gpu(numel=images.numel))
    )
    return fake_cuda(monkeypatch)


def models(family: str = "mask_16") -> tuple[InferenceSegmenter, InferenceSegmenter]:
    """One inference form with graphs and one without."""
    fast = pair(family, torch.float32)[0].optimize(torch.float32, compile=False)
    plain = copy.deepcopy(fast)
    plain.cuda_graph = False
    return fast, plain


@pytest.mark.parametrize("family", ["mask_16", "linear_16", "dinov3"])
def test_replays_give_the_results_of_plain_calls(cuda: SimpleNamespace, family: str) -> None:
    fast, plain = models(family)
    for images in (torch.randn(3, 2, 3, 40, 50), torch.randint(0, 256, (3, 2, 3, 40, 50), dtype=torch.uint8)):
        for one in images:
            for result in RESULTS:
                torch.testing.assert_close(getattr(fast, result)(one), getattr(plain, result)(one), rtol=0, atol=0)
    # Labels and scores of the patches, of two dtypes; the other results start from the scores.
    assert len(cuda.captures) == len(fast._graphs) == 4


def test_shares_of_merging_are_captured_and_thresholds_are_not(cuda: SimpleNamespace) -> None:
    fast, plain = (model.with_merging(sf.TokenMerging((0, 1), 0.3)) for model in models())
    for images in torch.randn(3, 2, 3, 40, 50):
        for result in (*RESULTS, "token_groups"):
            assert torch.equal(getattr(fast, result)(images), getattr(plain, result)(images))
    assert len(cuda.captures) == len(fast._graphs) == 4  # labels, masks, scores of groups, groups
    adaptive = fast.with_merging(sf.TokenMerging((0, 1), threshold=0.5))
    assert torch.equal(adaptive.segment(images), plain.with_merging(adaptive.config.merging).segment(images))
    assert len(cuda.captures) == 4
    assert not len(adaptive._graphs)


def test_a_graph_owns_what_it_reads(cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_segmenter, "_MAX_STEMS", 2)
    fast, plain = models()
    first = torch.randn(1, 3, 32, 32)
    expected = plain.segment(first)
    fast.segment(first)
    for side in (48, 64, 80):
        fast.segment(torch.randn(1, 3, side, side))
    assert torch.equal(fast.segment(first), expected)
    assert len(cuda.captures) == 4


def test_the_least_recently_used_graph_is_dropped(cuda: SimpleNamespace) -> None:
    fast, plain = models()
    sides = [16 * n for n in range(1, MOST_GRAPHS + 2)]
    for side in (*sides, sides[-1], sides[1]):
        images = torch.randn(1, 3, side, side)
        assert torch.equal(fast.masks(images), plain.masks(images))
    assert len(fast._graphs) == MOST_GRAPHS
    assert len(cuda.captures) == len(sides)
    fast.masks(torch.randn(1, 3, 16, 16))
    assert len(cuda.captures) == len(sides) + 1


def test_captures_are_on_the_images_device_in_one_pool(cuda: SimpleNamespace) -> None:
    fast, _ = models()
    for side in (32, 48):
        fast.segment(torch.randn(1, 3, side, side))
    assert [capture.devices for capture in cuda.captures] == [[torch.device("cpu")]] * 2
    assert {capture.mode for capture in cuda.captures} == {"thread_local"}
    assert cuda.captures[0].pool is cuda.captures[1].pool is not None
    assert cuda.captures[0].stream is cuda.captures[1].stream is not None  # a block serves one stream alone


def test_a_capture_after_a_failed_one(cuda: SimpleNamespace) -> None:
    """The allocator gives up a pool with its last graph and refuses it afterwards."""
    ours, images, fails = Graphs(), torch.ones(4), iter([False] * 3 + [True] + [False] * 100)

    def function(fixed: Tensor) -> Tensor:
        doubled = 2 * fixed
        if next(fails):
            raise RuntimeError("out of memory")
        return doubled

    with pytest.raises(RuntimeError, match="out of memory"):
        ours.run("key", function, images)
    for key in ("key", "other"):
        assert torch.equal(ours.run(key, function, images), 2 * images)
    first, second, third = cuda.captures
    assert first.pool is not second.pool is third.pool
    assert first.stream is second.stream is third.stream


def test_predict_and_then_segment(cuda: SimpleNamespace) -> None:
    """A buffer that was made in inference mode could not be written to outside of it."""
    fast, plain = models()
    sf.predict(fast, torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy(), window=32)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(fast.segment(images), plain.segment(images))
    with torch.inference_mode():
        assert torch.equal(fast.segment(images), plain.segment(images))
    assert len(cuda.captures) == 1


def test_numeric_settings_have_graphs_of_their_own(cuda: SimpleNamespace) -> None:
    fast, plain = models()
    images = torch.randn(1, 3, 32, 32)
    fast.masks(images)
    with torch.autocast("cpu", torch.bfloat16):
        low = fast.masks(images)
        assert torch.equal(low, plain.masks(images))
    assert not torch.equal(low, fast.masks(images))
    assert len(cuda.captures) == 2
    for count, settings in enumerate((torch.backends.cuda.matmul, torch.backends.cudnn.conv), 3):
        before = settings.fp32_precision
        settings.fp32_precision = "ieee" if before == "tf32" else "tf32"  # of products, of convolutions
        try:
            fast.masks(images)
        finally:
            settings.fp32_precision = before
        assert len(cuda.captures) == count


def test_threads_share_the_graphs(cuda: SimpleNamespace) -> None:
    ours = Graphs()

    def work(thread: int) -> None:
        for n in range(100):
            images = torch.full((8,), float(1000 * thread + n))
            for factor in (1.0, 2.0):
                taken = ours.run(factor, lambda fixed, factor=factor: fixed * factor + 1, images)
                assert torch.equal(taken, images * factor + 1)

    in_threads(work)
    assert len(cuda.captures) == 2


def test_a_replay_waits_for_the_result_on_another_stream(cuda: SimpleNamespace) -> None:
    ours, images = Graphs(), torch.ones(4)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream in (streams[0], streams[0], streams[1]):
        with torch.cuda.stream(stream):
            ours.run("key", torch.exp, images)
    assert not [one for one in streams[0].waited if one is ours._taken]
    assert streams[1].waited == [ours._taken]


def test_threads_share_a_model_in_training_mode() -> None:
    model, _ = pair("mask_16", torch.float32)
    model.config = model.config.replace(drop_path_rate=0.5)
    for block in model.encoder.blocks:
        block.drop_path = torch.nn.Dropout(0.5)
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    expected = sf.predict(model.eval(), image).labels
    model.train()

    def work(_: int) -> None:
        for _ in range(10):
            assert (sf.predict(model, image).labels == expected).all()

    in_threads(work)
    assert model.training
    assert model.encoder.blocks[0].drop_path.training


def test_compiler_settings_are_entered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = models()
    fast.compile_graph = True
    entered, compiled = [], []
    settings = InferenceSegmenter._compiler_settings

    def counted(model: InferenceSegmenter) -> object:
        entered.append(1)
        return settings(model)

    def compile(function: Callable[..., Tensor], **_: object) -> Callable[..., Tensor]:
        compiled.append(function)
        return function

    monkeypatch.setattr(InferenceSegmenter, "_compiler_settings", counted)
    monkeypatch.setattr(torch, "compile", compile)
    for _ in range(3):
        fast.segment(torch.randn(1, 3, 32, 32))
    assert len(entered) == len(compiled) == 1
    fast.segment(torch.randn(2, 3, 32, 32))
    assert len(entered) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("device", range(torch.cuda.device_count()))
def test_graphs_on_every_device(device: int) -> None:
    fast, plain = (model.to(f"cuda:{device}") for model in models())

    def work(_: int) -> None:
        generator = torch.Generator(f"cuda:{device}").manual_seed(0)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            for side in (64, 48, 64, 80):
                images = torch.randn(1, 3, side, side, device=f"cuda:{device}", generator=generator)
                for result in RESULTS:
                    torch.testing.assert_close(getattr(fast, result)(images), getattr(plain, result)(images))

    in_threads(work)
    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    assert (sf.predict(fast, image).labels == sf.predict(plain, image).labels).all()
    assert torch.equal(
        fast.segment(images := torch.randn(1, 3, 64, 64, device=f"cuda:{device}")), plain.segment(images)
    )
