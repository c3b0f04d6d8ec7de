"""C++ kernels: how they are built, and what happens where they cannot be."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from segmenter_fast.kernels import attention, reference, upsample_argmax
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
    for function in (native._unsupported, native._warn, native._compiler, native._library, native._cache_folder):
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
    assert_warns_once(recwarn, "no library of attention.cpp", "no such thing")
    assert not list(own_cache.iterdir())


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "g++" in str(native.unavailable())
    assert_attention_is_right()
    assert_warns_once(recwarn, "no C++ compiler", "set CXX", "SEGMENTER_FAST_NATIVE=0")


def assert_warns_once(found: pytest.WarningsRecorder, *texts: str) -> None:
    (message,) = [str(warning.message) for warning in found]
    assert all(text in message for text in texts), message


@pytest.mark.parametrize("size", [0, 3000, -1])
def test_a_damaged_library_is_made_anew(own_cache: Path, size: int, recwarn: pytest.WarningsRecorder) -> None:
    assert_attention_is_right()
    (library,) = own_cache.iterdir()
    whole = library.read_bytes()
    library.unlink()  # the old one is still loaded
    library.write_bytes(whole[:size])
    forget()
    assert_attention_is_right()
    assert library.read_bytes()[-32:] == hashlib.sha256(library.read_bytes()[:-32]).digest()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("g++ -m64", None),
        ("env g++", None),
        ("nonexistent", "CXX=nonexistent is no"),
        ('g++ "', "is no compiler"),
        ("true", "it wrote nothing"),
    ],
)
def test_commands_of_compilers(
    command: str, said: str | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("CXX", command)
    assert_attention_is_right()
    if said:
        assert_warns_once(recwarn, said)
    else:
        assert not recwarn.list


def test_a_relative_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGMENTER_FAST_CACHE", ".")
    assert_attention_is_right()
    monkeypatch.chdir(tmp_path / "there")
    scores = torch.randn(1, 2, 4, 4)
    assert torch.equal(upsample_argmax(scores, (8, 8)), reference.upsample_argmax(scores, (8, 8)))
    assert len(list(tmp_path.glob("*.so"))) == 2
    assert not recwarn.list


def test_a_user_without_home(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fails)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert_attention_is_right()
    assert list(own_cache.iterdir())
    monkeypatch.delenv("SEGMENTER_FAST_CACHE")
    forget()
    with pytest.warns(RuntimeWarning, match="home directory.*set SEGMENTER_FAST_CACHE"):
        assert_attention_is_right()


def test_switched_off(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGMENTER_FAST_NATIVE", "0")
    assert native.unavailable() == "SEGMENTER_FAST_NATIVE=0"
    assert_attention_is_right()
    assert not own_cache.exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(own_cache: Path) -> None:
    own_cache.mkdir(mode=0o500)
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        assert_attention_is_right()
    assert not list(own_cache.iterdir())


def test_a_cache_that_is_a_file(own_cache: Path) -> None:
    own_cache.write_text("mine")
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        assert_attention_is_right()
    assert own_cache.read_text() == "mine"
