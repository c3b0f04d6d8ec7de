"""The demo compares the models on a photograph and says where the overlay is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from segmenter_fast import VARIANTS
from segmenter_fast.benchmarks.case import DisagreementError
from segmenter_fast.benchmarks.models import demo
from segmenter_fast.benchmarks.models.summary import compared
from segmenter_fast.cli import app


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pixels and layers; compiling them takes as long as running them."""
    monkeypatch.setattr(demo, "SIDE", 64)
    for name in ("seg_t_mask_16", "seg_t_linear_16"):
        monkeypatch.setitem(VARIANTS, name, VARIANTS[name].replace(depth=2, decoder_depth=1))


def test_float32_agrees_and_the_overlay_is_there(tmp_path: Path) -> None:
    ((case, rows, overlay),) = demo.run_demo(
        tmp_path / "out", torch.device("cpu"), torch.float32, variants=["seg_t_mask_16"], seconds=0.1
    )
    assert case["variant"] == "seg_t_mask_16"
    for row in compared(rows):
        assert row.timing is not None
        assert row.error is not None
        assert row.error < 1e-3
        assert row.labels is not None
        assert row.labels > 0.999
    assert min(Image.open(overlay).size) > 64  # the image with a legend below
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["seg_t_mask_16.png"]


def test_a_wrong_kernel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segmenter_fast.vit.kernels.attention", lambda qkv, **_: qkv[:, :, 2].contiguous())
    with pytest.raises(DisagreementError, match="logits are off"):
        next(demo.run_demo(tmp_path, torch.device("cpu"), torch.float32, variants=["seg_t_mask_16"], seconds=0.1))
    assert not list(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--variant", "seg_t_mask_16", "--dtype", "float32"])
    assert done.exit_code == 1, done.output
    assert "refused" in done.output


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    arguments = ["demo", "--out", str(tmp_path), "--variant", "seg_t_linear_16", "--dtype", "float32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "seg_t_linear_16" in result.output
    assert "random" in result.output
    stages = [line.partition(" s: ")[2] for line in result.stderr.splitlines() if " s: " in line]
    assert stages[0] == "segmenting drawn scenes by the trained model"
    assert stages[1] == "seg_t_linear_16: running reference"
    assert stages[-1] == "seg_t_linear_16: timing reference, peer, ours"
    missing = CliRunner().invoke(app, [*arguments, "--image", str(tmp_path / "missing.jpg")])
    assert missing.exit_code == 2
    assert "missing.jpg" in missing.output
