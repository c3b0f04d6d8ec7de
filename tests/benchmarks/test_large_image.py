"""The benchmark of large images on a small one: a whole command, its memory and its labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from segmenter_fast.benchmarks import large_image

OPTIONS = ["--side", "700", "--window", "64", "--overlap", "16", "--classes", "7", "--device", "cpu"]


def test_the_image_is_tiled_and_has_structure(tmp_path: Path) -> None:
    large_image.make_image(tmp_path / "x.tif", 2100)
    with tifffile.TiffFile(tmp_path / "x.tif") as file:
        page = file.pages[0]
        assert page.is_tiled
        assert page.shape == (2100, 2100, 3)
        pixels = page.asarray()
    assert pixels.std() > 30
    steps = abs(np.diff(pixels.astype(int), axis=0)).mean((1, 2))
    assert steps[[511, 1023, 2047]].max() < 1.3 * steps.mean()  # no edges where tiles meet
    assert np.array_equal(pixels[2048:], pixels[:52])


def test_a_small_image_gives_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert large_image.main([*OPTIONS, "--out", str(tmp_path)]) == 0
    assert "peak resident memory" in capsys.readouterr().out
    (path,) = tmp_path.rglob("large_image.json")
    run = json.loads(path.read_text())["run"]
    assert run["windows"] == 15**2
    assert run["agreement"] >= 0.998
    assert 1e8 < run["peak_resident_bytes"] < 3e9
    assert run["windows_per_s"] == pytest.approx(run["windows"] / run["seconds"])


def test_what_is_wrong_or_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = dict.fromkeys(large_image.Run.__dataclass_fields__, 1) | {"variant": "v", "dtype": "d"}
    for changed, message in {
        ("agreement", 0.9): "refused: 90.00% of the labels",
        ("peak_resident_bytes", 4 * 10**9): "refused: more than the limit of 3 GB",
    }.items():
        run = large_image.Run(**{**values, changed[0]: changed[1]})
        monkeypatch.setattr(large_image, "measure", lambda *arguments, run=run, **fields: run)
        assert large_image.main([*OPTIONS, "--out", str(tmp_path)]) == 1
        assert message in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))
    with pytest.raises(SystemExit):
        large_image.main(["--overlap", "256"])
