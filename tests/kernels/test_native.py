"""C++ kernels: how they are built, and what happens where they cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from segmenter_fast.kernels import attention, reference
from segmenter_fast.kernels.cpu import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"C++ kernels: {native.unavailable()}")
TYPES = "p" * 4 + "i" * 10 + "f"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing loaded before or after."""
    monkeypatch.setenv("SEGMENTER_FAST_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    forget()


def forget() -> None:
    for function in (native._unsupported, native._compiler, native._library, native._cache_folder):
        function.cache_clear()


def assert_attention_is_right() -> None:
    qkv = torch.randn(2, 37, 3, 2, 16)
    torch.testing.assert_close(attention(qkv), reference.attention(qkv))


def test_a_library_is_built_once_and_kept(own_cache: Path) -> None:
    assert native.function("attention", "attention", TYPES) is not None
    (library,) = own_cache.iterdir()
    built = library.stat().st_mtime_ns
    forget()
    assert native.function("attention", "attention", TYPES) is not None
    assert [path.stat().st_mtime_ns for path in own_cache.iterdir()] == [built]


def test_a_changed_source_is_built_anew(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "src"
    sources.mkdir()
    monkeypatch.setattr(native, "_SOURCES", sources)
    for value in (1, 2):
        (sources / "answer.cpp").write_text(f'extern "C" void answer(float* out) {{ *out = {value}; }}')
        forget()
        function, out = native.function("answer", "answer", "p"), torch.zeros(1)
        assert function is not None
        function(out.data_ptr())
        assert out.item() == value
    assert len(list(own_cache.iterdir())) == 2


def test_threads_and_processes_build_side_by_side(own_cache: Path) -> None:
    code = (
        "from segmenter_fast.kernels.cpu import native; print(native.function('attention', 'attention', 'p') is None)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    threads = [threading.Thread(target=assert_attention_is_right) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.communicate()[0] for process in processes] == [b"False\n"] * 2
    assert len(list(own_cache.iterdir())) == 1


def test_errors_of_the_compiler_are_told_once(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    compiler = tmp_path / "broken c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{compiler}'")
    for _ in range(2):
        assert_attention_is_right()
    (warning,) = [str(warning.message) for warning in recwarn if "could not build" in str(warning.message)]
    assert "attention.cpp" in warning
    assert "no such thing" in warning
    assert not list(own_cache.iterdir())


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "g++" in str(native.unavailable())
    assert_attention_is_right()
    assert not recwarn.list


def test_switched_off(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGMENTER_FAST_NATIVE", "0")
    assert native.unavailable() == "SEGMENTER_FAST_NATIVE=0"
    assert_attention_is_right()
    assert not own_cache.exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(own_cache: Path) -> None:
    own_cache.mkdir(mode=0o500)
    assert_attention_is_right()
    assert not list(own_cache.iterdir())


def test_a_cache_that_is_a_file(own_cache: Path) -> None:
    own_cache.write_text("mine")
    assert_attention_is_right()
    assert own_cache.read_text() == "mine"
