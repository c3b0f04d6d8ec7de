"""No command replaces a file that it did not write from the same inputs, but with --overwrite."""

from __future__ import annotations

from pathlib import Path

import pytest

from segmenter_fast.train.logs import RunLog
from support.predict import MODEL, call


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with RunLog(tmp_path / "run", 2, 1) as log:
        log.step(1, 0.5, 0.1)
    return tmp_path / "run"


def test_files_of_the_user_stay(tmp_path: Path, run: Path) -> None:
    for name in ("x.png", "x.onnx", "x.json", "model.safetensors"):
        (tmp_path / name).write_text("mine")
    for arguments in (
        ("plot", run, "--out", tmp_path / "x.png"),
        ("check", MODEL, tmp_path, "--out", tmp_path / "x.png"),
        ("export", MODEL, tmp_path / "x.onnx"),
        ("evaluate", MODEL, "--data", "shapes", "--json", tmp_path / "x.json"),
        ("convert", MODEL, tmp_path),
    ):
        result = call(*arguments)
        assert result.exit_code == 2, arguments
        assert "exists; choose another path, or replace it by --overwrite" in result.stderr
    assert all((tmp_path / name).read_text() == "mine" for name in ("x.png", "x.onnx", "x.json", "model.safetensors"))
    assert call("convert", MODEL, tmp_path, "--overwrite").exit_code == 0
    assert (tmp_path / "model.safetensors").stat().st_size > 1000


def test_a_plot_of_the_same_runs_is_drawn_again(tmp_path: Path, run: Path) -> None:
    for _ in range(2):
        assert call("plot", run, "--out", tmp_path / "curves.png").exit_code == 0
    run.rename(tmp_path / "other")
    assert call("plot", tmp_path / "other", "--out", tmp_path / "curves.png").exit_code == 2


def test_a_place_that_takes_no_files_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file/x.json"
    refused = call("evaluate", MODEL, "--data", "absent", "--json", place)
    assert refused.stderr == f"error: {place} cannot be written: {place.parent} takes no files\n"
    monkeypatch.setattr("os.access", lambda *_, **__: False)  # as root may write anywhere
    refused = call("export", "absent", tmp_path / "new/x.onnx")
    assert refused.stderr == f"error: {tmp_path / 'new/x.onnx'} cannot be written: {tmp_path} takes no files\n"
