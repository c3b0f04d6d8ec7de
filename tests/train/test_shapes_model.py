"""The model that the package carries is as good as its record, and the demo shows it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import segmenter_fast as sf
from segmenter_fast.benchmarks.models import demo
from segmenter_fast.cli import app
from segmenter_fast.train import shapes_merging
from segmenter_fast.train.datasets.shapes import HELD_OUT, Shapes
from segmenter_fast.train.shapes_model import (
    MODEL,
    RECORD,
    compare_scenes,
    held_out_scenes,
    load_shapes_model,
    replace_shapes_model,
)


def test_the_carried_model_is_as_good_as_its_record_says() -> None:
    record = json.loads((MODEL / RECORD).read_text())
    assert (MODEL / "model.safetensors").stat().st_size < 6_000_000
    model = load_shapes_model()
    dataset = held_out_scenes(model)
    assert dataset.seed == record["held_out"]["seed"] >= HELD_OUT > record["recipe"]["seed"]
    _, scores = compare_scenes(model, dataset, scenes=60)
    assert scores.miou == pytest.approx(record["held_out"]["miou"], abs=0.04)
    assert record["held_out"]["miou"] > 0.85
    assert record["seconds"] < 600


def test_the_picture_shows_scenes_truth_and_prediction() -> None:
    class Black(Shapes):
        """Empty scenes."""

        def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            return np.zeros((self.size, self.size, 3), np.uint8), np.full((self.size, self.size), 3, np.uint8)

    model = load_shapes_model()
    picture = np.asarray(compare_scenes(model, Black(size=96), scenes=1, rows=1)[0])
    panels = [picture[21 : 21 + 288, 294 * column : 294 * column + 288] for column in range(3)]
    assert not panels[0].any()
    assert (panels[1] == Shapes.palette[3]).all()
    assert {tuple(color) for color in panels[2].reshape(-1, 3)} <= set(Shapes.palette)


def test_models_of_other_classes_and_too_few_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="model's classes"):
        compare_scenes(sf.create_model("seg_m_mask_8", num_classes=8, image_size=96), Shapes(length=40))
    with pytest.raises(ValueError, match="within 1 to 2, in this order, got 3 and 32"):
        compare_scenes(load_shapes_model(), Shapes(length=2))


def test_a_run_replaces_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    load_shapes_model().save_pretrained(run / "best")
    (run / "run.json").write_text(json.dumps({"recipe": {"seed": 4}}))
    (run / "log.jsonl").write_text('{"kind": "step", "step": 0, "time": 1}\n{"kind": "step", "step": 9, "time": 62}\n')
    monkeypatch.setattr("segmenter_fast.train.shapes_model.held_out_scenes", lambda model: Shapes(96, 6, HELD_OUT))
    record = replace_shapes_model(run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == record
    assert (record["seconds"], record["recipe"]) == (61, {"seed": 4})
    assert record["held_out"]["miou"] == pytest.approx(
        compare_scenes(load_shapes_model(), Shapes(96, 6, HELD_OUT), 6)[1].miou, abs=1e-4
    )
    assert sf.load(tmp_path / "out").config == load_shapes_model().config
    monkeypatch.setattr("segmenter_fast.train.shapes_model.LIMIT", 1000)
    with pytest.raises(ValueError, match="must be at most 1,000 bytes"):
        replace_shapes_model(run, tmp_path / "out")


def test_the_demo_shows_the_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *arguments, show: iter(()))
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "held-out" in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shapes.png"]


def test_scores_of_token_merging_on_a_few_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    load_shapes_model().with_merging({"layers": [1], "share": 0.5}).save_pretrained(run / "best")
    (run / "run.json").write_text(json.dumps({"recipe": {"steps": 300}}))
    monkeypatch.setattr(shapes_merging, "held_out_scenes", lambda model: Shapes(96, 3, HELD_OUT))
    monkeypatch.setattr(shapes_merging, "SHARES", (0.0, 0.3))
    shapes_merging.main(run, run, tmp_path / "out")
    exact, none, merged, trained, off, *_ = found = json.loads((tmp_path / "out/scores.json").read_text())
    assert exact["miou"] == none["miou"] == off["miou"] > merged["miou"]
    assert exact["macs"] == none["macs"] > trained["macs"] > merged["macs"]
    assert (exact["share"], merged["share"], trained["share"]) == (None, [0.3, 0.3, 0.3], [0.5])
    assert (trained["steps"], exact["scenes"], len(found)) == (300, 3, 7)
    assert (tmp_path / "out/scores.png").stat().st_size > 1000
