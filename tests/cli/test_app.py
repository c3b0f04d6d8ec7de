"""Models, messages and help that all commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

import segmenter_fast as sf
from segmenter_fast.cli import checkpoints
from segmenter_fast.kernels.cpu import native
from support.folders import write_folder
from support.predict import MODEL, call


def test_random_weights_are_called_random() -> None:
    result = call("info", "seg_t_linear_16")
    assert result.exit_code == 0
    assert "RANDOM weights" in result.stderr
    assert "RANDOM" not in call("info", MODEL).stderr


def test_a_wrong_choice_names_the_allowed_ones_in_plain_words() -> None:
    for option, known in (("--preset", "'ade20k', 'pascal_context'"), ("--optimizer", "'sgd', 'adamw'")):
        result = call("train", "--data", "x", "--out", "x", option, "ad20k")
        assert result.exit_code == 2
        words = " ".join(result.stderr.replace("│", " ").split())
        assert f"{option}" in words
        assert f"'ad20k' is not one of {known}" in words
        assert "Value error" not in words


def test_the_help_of_train_has_choices_and_defaults() -> None:
    words = " ".join(call("train", "--help").output.replace("│", " ").split())
    for wanted in ("<sgd|adamw|muon>", "<ade20k|pascal", "Passes over the data, where steps is 0."):
        assert wanted.replace(" ", "") in words.replace(" ", "")
    for wanted in ("Default:64,pascal_context256,cityscapes216,folder50.", "Default:0.9,shapes0.95."):
        assert wanted in words.replace(" ", "")


def test_an_import_that_is_broken_off_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr(checkpoints, "info_table", broken_off)
    result = call("info", MODEL)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_info_says_whether_cpp_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (native.unavailable() or "run") in " ".join(call("info", MODEL).output.split())
    monkeypatch.setenv("SEGMENTER_FAST_NATIVE", "0")
    assert "SEGMENTER_FAST_NATIVE=0" in call("info", MODEL).output


def test_version_and_help() -> None:
    assert call("--version").output == f"segmenter-fast {sf.__version__}\n"
    for command in ("predict", "info", "variants"):
        assert command in call("--help").output
        assert call(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        ("dataset", "check", "DATA", "--palette", "NONE"),
        ("train", "--data", "DATA", "--preset", "folder", "--out", "run", "--palette", "NONE"),
        ("evaluate", MODEL, "--data", "DATA", "--palette", "NONE"),
        ("check", MODEL, "DATA", "--palette", "NONE"),
        ("evaluate", MODEL, "--data", "NONE"),
        ("dataset", "check", "NONE"),
        ("check", MODEL, "NONE"),
        ("check", MODEL, "DATA", "--labels", "NONE"),
        ("predict", "NONE", "--model", MODEL, "--out", "out"),
        ("predict", "DATA", "--model", "NONE", "--out", "out"),
        ("info", "NONE"),
        ("plot", "NONE"),
        ("demo", "--image", "NONE"),
        ("bench", "compare", "NONE", "NONE"),
    ],
    ids=" ".join,
)
def test_a_path_of_nothing_is_named_in_plain_words(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    found = call(*(option.replace("DATA", "data").replace("NONE", "some/thing/missing") for option in options))
    assert found.exit_code == 2, found.output
    assert "Errno" not in found.stderr
    assert "some/thing/missing" in found.stderr
    assert not (tmp_path / "out").exists()
