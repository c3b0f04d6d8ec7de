"""``--merge`` of the commands, and ``--show-tokens``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import segmenter_fast as sf
from support.predict import call, labels, photo

MERGE = '{"layers": [1], "share": 0.5}'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "small"
    fields = {"embed_dim": 64, "num_heads": 2, "decoder_num_heads": 2, "depth": 3, "decoder_depth": 1}
    model = sf.create_model("seg_t_mask_16", num_classes=4, image_size=64, window_size=64, window_stride=64, **fields)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return str(folder)


def test_predict_merges_and_resumes_with_the_same_merging_alone(checkpoint: str, tmp_path: Path) -> None:
    source, out = photo(tmp_path / "x.png", 64, 64), tmp_path / "out"
    options = ("predict", source, "--model", checkpoint, "--out", out, "--device", "cpu", "--dtype", "float32")
    result = call(*options, "--merge", MERGE)
    assert result.exit_code == 0, result.output
    model = sf.load(checkpoint, merge=json.loads(MERGE)).optimize("float32", compile=False)
    assert np.array_equal(labels(out)["x.png"], sf.predict(model, source).labels)
    assert "0 written, 1 skipped" in call(*options, "--resume", "--merge", MERGE).output
    assert "its output had another model" in call(*options, "--resume").output
    assert np.array_equal(labels(out)["x.png"], sf.predict(model, source, merge="none").labels)
    result = call(*options, "--overwrite", "--merge", "fsat")
    assert result.exit_code == 2
    assert "did you mean fast?" in result.output


def test_evaluate_writes_the_merging_down(checkpoint: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    photo(tmp_path / "data/images/val/x.png", 64, 64)
    (tmp_path / "data/labels/val").mkdir(parents=True)
    Image.fromarray(generator.integers(0, 4, (64, 64), np.uint8)).save(tmp_path / "data/labels/val/x.png")
    (tmp_path / "data/classes.txt").write_text("a\nb\nc\nd\n")
    arguments = ("evaluate", checkpoint, "--data", tmp_path / "data", "--kind", "folder", "--device", "cpu")
    result = call(*arguments, "--merge", MERGE, "--json", tmp_path / "scores.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "scores.json").read_text())["merging"]
    assert found == {"layers": [1], "share": 0.5, "threshold": None, "matching": "bipartite"}


def test_a_threshold_cannot_be_exported(checkpoint: str, tmp_path: Path) -> None:
    merge = '{"layers": [1], "threshold": 0.9}'
    result = call("export", checkpoint, tmp_path / "x.pt2", "--merge", merge)
    assert result.exit_code == 2
    assert "merges tokens by a threshold has no fixed sizes to export; give it shares" in result.output
    result = call("export", checkpoint, tmp_path / "x.onnx", "--merge", MERGE)
    assert result.exit_code == 2
    assert "ONNX has no stable sort" in result.output
    assert list(tmp_path.iterdir()) == []
