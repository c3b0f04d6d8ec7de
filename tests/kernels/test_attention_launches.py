"""Tiles and backend that attention chooses by chip, without a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from segmenter_fast.kernels import attention
from segmenter_fast.kernels.registry import HEAD_SIZES, INTERPRET

from .conftest import Backend
from .test_attention import assert_attention, inputs
from .test_attention_bias import assert_attention as assert_with_bias

module = importlib.import_module("segmenter_fast.kernels.ops.attention")


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx1100"])
def test_launch_config_of_every_chip(arch: str) -> None:
    forward = pytest.importorskip("segmenter_fast.kernels.gpu.attention_forward", reason="needs Triton")
    backward = importlib.import_module("segmenter_fast.kernels.gpu.attention_backward")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for dim in HEAD_SIZES:
            for n, heads in ((1, 1), (257, 96), (4097, 96), (1025, 12)):
                case = dim, n, dtype, arch, heads, 132, n == 4097
                for tiles in (forward.launch_config(*case), *backward.launch_config(*case)):
                    assert tiles.block_m % forward.TAIL == tiles.block_n % forward.TAIL == 0


def test_tiles_of_few_programs() -> None:
    """Blocks of 128 queries only where 132 multiprocessors have four of them each and few of their rows are empty."""
    forward = pytest.importorskip("segmenter_fast.kernels.gpu.attention_forward", reason="needs Triton")
    lengths = ((4097, 12), (4097, 24), (577, 768), (1025, 768), (257, 1536))
    rows = [forward.launch_config(64, n, torch.bfloat16, "sm_90", heads, 132).block_m for n, heads in lengths]
    assert rows == [64, 128, 128, 64, 64]
    assert [forward.tail(n, 64) for n in (1, 16, 17, 64, 65, 1080)] == [16, 16, 64, 0, 16, 64]


def test_two_programs_of_the_keys_share_a_multiprocessor() -> None:
    """A multiprocessor of sm_90 has 65,536 registers; more than 128 a thread leave room for one program of 8 warps."""
    aot = pytest.importorskip("segmenter_fast.kernels.aot", reason="needs Triton")
    if INTERPRET:
        pytest.skip("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled")
    names = [
        launch.name for launch in aot.shipped("sm_90") if "keys D=64 bf16 ieee (32, 128, 8, 3, 128)" in launch.name
    ]
    (build,) = aot.build_all([("sm_90", name) for name in names])
    assert build.registers <= 128
    assert not build.defect


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_gpus_before_ampere_take_the_kernel_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    calls: list[tuple[torch.Size, torch.Size | None]] = []

    def pytorch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        calls.append((q.shape, None if mask is None else mask.shape))
        return torch.empty(q.shape)

    monkeypatch.setattr(module, "_capability", lambda device: capability)
    monkeypatch.setattr(F, "scaled_dot_product_attention", pytorch)
    with FakeTensorMode():
        qkv, bias = torch.empty(2, 5, 3, 4, 16, device="cuda", dtype=torch.float16), torch.empty(2, 5, device="cuda")
        shapes = [attention(qkv, bias=given).shape for given in (None, bias)]
    assert shapes == [(2, 5, 4, 16)] * 2
    assert calls == ([((2, 4, 5, 16), None), ((2, 4, 5, 16), (2, 1, 5, 5))] if capability < (8, 0) else [])


def test_the_choice_of_the_kernel_is_a_constant_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_capability", lambda device: (7, 5))

    def negate(x: Tensor) -> Tensor:
        return -x if module._before_ampere(torch.device("cuda", 0)) else x

    assert torch.compile(negate, backend="eager", fullgraph=True)(torch.ones(1)) == -1


@pytest.mark.interpret
@pytest.mark.parametrize("n", [129, 150])
def test_tiles_of_many_programs_compute_the_same(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Tiles of sm_90 for long sequences, which are too slow for the interpreter, on a short one."""
    for name in ("forward", "backward"):
        kernel = importlib.import_module(f"segmenter_fast.kernels.gpu.attention_{name}")
        tiles = kernel.launch_config(64, 4097, torch.float16, "sm_90", 96, 132)
        monkeypatch.setattr(kernel, "launch_config", lambda *args, tiles=tiles: tiles)
    arguments = inputs(Backend("interpret", "cpu", ()), 1, n, 1, 64, torch.float16)
    assert_attention(*arguments)
    assert_with_bias(*arguments, torch.arange(n)[None].log1p())
