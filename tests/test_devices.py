"""Devices and dtypes by name; "auto" depends on the hardware."""

from __future__ import annotations

import pytest
import torch

from segmenter_fast.devices import choose_compile, choose_device, choose_dtype, computes_slowly, cpu_is_fast_in_bfloat16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


@pytest.mark.parametrize(("amx", "avx512"), [(True, False), (False, True), (False, False)])
def test_auto_on_a_cpu(amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpu(monkeypatch, amx, avx512)
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if amx or avx512 else torch.float32)


@pytest.mark.parametrize(("amx", "avx512"), [(True, False), (False, True), (False, False)])
def test_slow_dtypes_and_compilation_of_a_cpu(amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpu(monkeypatch, amx, avx512)
    assert computes_slowly(torch.bfloat16, CPU) == (not (amx or avx512))
    assert not computes_slowly(torch.float32, CPU)
    assert choose_compile("auto", CPU, torch.bfloat16) == amx
    assert not choose_compile("auto", CPU, torch.float32)
    assert choose_compile(True, CPU, torch.float32)
    assert choose_compile("auto", CUDA, torch.float32)
    with pytest.raises(ValueError, match="compile must be True, False or 'auto', got 1"):
        choose_compile(1, CPU, torch.float32)


def test_a_cpu_that_may_not_use_its_avx512_is_slow_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpu(monkeypatch, amx=True, avx512=True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert choose_dtype("auto", CPU) == torch.float32


def test_a_pytorch_that_cannot_tell_means_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not cpu_is_fast_in_bfloat16()
    assert choose_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_auto_on_a_gpu(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert choose_dtype("auto", CUDA) == (torch.bfloat16 if supported else torch.float16)


def test_named_dtypes_are_taken_as_named() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose_dtype(str(dtype).removeprefix("torch."), CPU) == choose_dtype(dtype, CPU) == dtype
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16, got 'int8'"):
        choose_dtype("int8", CPU)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == CPU
    with pytest.raises(ValueError, match="device cuda is not there"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto") == CUDA
    with pytest.raises(ValueError, match="device cuda:1 is not there"):
        choose_device("cuda:1")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'toaster'"):
        choose_device("toaster")
