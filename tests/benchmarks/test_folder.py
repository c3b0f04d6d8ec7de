"""The whole job against the model alone: figures where the files are right, none where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from segmenter_fast import VARIANTS
from segmenter_fast.benchmarks import runner
from segmenter_fast.benchmarks.models import folder
from segmenter_fast.benchmarks.results import read
from segmenter_fast.cli import app
from support.benchmarks import CEILINGS


@pytest.fixture(autouse=True)
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    small = VARIANTS["seg_t_mask_16"].replace(depth=1, decoder_depth=1, window_size=64)
    monkeypatch.setitem(VARIANTS, "seg_t_mask_16", small)
    monkeypatch.setattr(runner, "measure_ceilings", lambda *args, **kwargs: CEILINGS)
    monkeypatch.setattr(folder, "SIDE", 64)


def bench(out: Path) -> Result:
    options = ("--variant", "seg_t_mask_16", "--photographs", "6", "--dtype", "float32", "--device", "cpu")
    return CliRunner().invoke(app, ["bench", "folder", *options, "--out", str(out)])


def test_the_job_is_timed_beside_the_model_alone(tmp_path: Path) -> None:
    result = bench(tmp_path)
    assert result.exit_code == 0, result.output
    ((case, rows),) = read(next(tmp_path.glob("*/folder.json"))).cases
    assert (case["variant"], case["photographs"], case["batch"], case["dtype"]) == ("seg_t_mask_16", 6, 2, "float32")
    assert [row.variant for row in rows] == [folder.SEGMENT, folder.LABELS, folder.OVERLAYS]
    for row in rows:
        assert row.timing is not None
        assert row.images_s == pytest.approx(1e3 / row.timing.median_ms)
        assert row.variant in result.output


def test_wrong_labels_have_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = folder.read_labels
    monkeypatch.setattr(folder, "read_labels", lambda path: real(path) ^ (path.stem == "00000"))
    result = bench(tmp_path)
    assert result.exit_code == 1
    found = read(next(tmp_path.glob("*/folder.json")))
    assert found.refused == ["seg_t_mask_16: 00000.png has other labels than segment"]
    assert all(row.status == "refused" and row.timing is None for row in found.cases[0][1])


def test_photographs_are_different_views_of_the_same_size(tmp_path: Path) -> None:
    folder.write_photographs(tmp_path / "in", 4)
    files = sorted((tmp_path / "in").iterdir())
    assert len({path.read_bytes() for path in files}) == 4
    for path in files:
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (64, 64))
