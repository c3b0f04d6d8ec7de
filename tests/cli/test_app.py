"""Models, messages and help that all commands share."""

from __future__ import annotations

import segmenter_fast as sf
from support.predict import MODEL, call


def test_random_weights_are_called_random() -> None:
    result = call("info", "seg_t_linear_16")
    assert result.exit_code == 0
    assert "RANDOM weights" in result.stderr
    assert "RANDOM" not in call("info", MODEL).stderr


def test_version_and_help() -> None:
    assert call("--version").output == f"segmenter-fast {sf.__version__}\n"
    for command in ("predict", "info", "variants"):
        assert command in call("--help").output
        assert call(command, "--help").exit_code == 0
