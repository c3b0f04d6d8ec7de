"""``--merge`` of the commands, and ``--show-tokens``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segmenter_fast as sf
from segmenter_fast.io.images import normalise
from segmenter_fast.visualize import draw_groups
from support.predict import call, labels, photo, tree

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
    fields = {"threshold": None, "matching": "bipartite", "channels": None, "crowd": None}
    assert found == {"layers": [1], "share": 0.5, **fields}


def test_a_threshold_cannot_be_exported(checkpoint: str, tmp_path: Path) -> None:
    merge = '{"layers": [1], "threshold": 0.9}'
    result = call("export", checkpoint, tmp_path / "x.pt2", "--merge", merge)
    assert result.exit_code == 2
    assert "merges tokens by a threshold has no fixed sizes to export; give it shares" in result.output
    assert list(tmp_path.iterdir()) == []
    result = call("export", checkpoint, tmp_path / "x.onnx", "--merge", MERGE)
    assert result.exit_code == 0, result.output
    assert tree(tmp_path) == ["x.onnx"]


def test_tokens_are_drawn_beside_the_labels(checkpoint: str, tmp_path: Path) -> None:
    names, out = ("x", "y"), tmp_path / "out"
    sources = [photo(tmp_path / "in" / f"{name}.png", 64, 64) for name in names]
    options = ("predict", tmp_path / "in", "--model", checkpoint, "--out", out, "--device", "cpu", "--merge", MERGE)
    options = (*options, "--dtype", "float32")
    assert call(*options).exit_code == 0
    result = call(*options, "--resume", "--show-tokens")  # finished, but for the tokens
    assert "2 written" in result.output
    model = sf.load(checkpoint, merge=json.loads(MERGE))
    for name, source in zip(names, sources, strict=True):
        pixels = np.asarray(Image.open(source).convert("RGB"))
        images = normalise(pixels, model.config.mean, model.config.std, torch.device("cpu"))
        groups = model.token_groups(images)[0].numpy()
        assert groups.max() + 1 == 8
        assert (np.asarray(Image.open(out / "tokens" / f"{name}.png")) == draw_groups(pixels, groups, 16)).all()
    assert "0 written, 2 skipped" in call(*options, "--resume", "--show-tokens").output
    (out / "tokens" / "x.png").unlink()
    assert "1 written" in call(*options, "--resume", "--show-tokens").output
    photo(out / "tokens" / "x.png")  # of somebody else
    result = call(*options, "--resume", "--show-tokens")
    assert result.exit_code == 2
    assert "x.png is in the place of outputs" in result.output


def test_tokens_that_cannot_be_drawn(checkpoint: str, tmp_path: Path) -> None:
    photo(tmp_path / "in/large.png", 64, 80)
    photo(tmp_path / "in/x.png", 64, 64)
    out = tmp_path / "out"
    options = ("predict", tmp_path / "in", "--model", checkpoint, "--out", out, "--device", "cpu", "--show-tokens")
    for more, message in (
        ((), "merges no tokens; give a --merge, such as fast"),
        (("--merge", "none"), "--show-tokens draws one run of a model that merges"),
        (("--merge", "fast", "--flip"), "--show-tokens draws one run of a model that merges"),
    ):
        result = call(*options, *more)
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", " ").split())
        assert not out.exists()
    result = call(*options, "--merge", MERGE)
    assert result.exit_code == 0
    assert "80 x 64 pixels are enlarged or take several windows of 64" in " ".join(result.output.split())
    assert tree(out) == [f"{kind}/{name}.png" for kind in ("labels", "overlays") for name in ("large", "x")] + [
        "tokens/x.png"
    ]
