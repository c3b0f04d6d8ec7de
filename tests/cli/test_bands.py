"""Images of four bands of 12 bits through every command, against the model on tensors made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import segmenter_fast as sf
from segmenter_fast.io import images
from support.models import windowed
from support.predict import call, labels

BANDS, SCALE = (4, 1, 3), 4095
OPTIONS = ("--device", "cpu", "--bands", "4,1,3", "--scale", SCALE)
# WGS 84 / UTM zone 33N as geokeys, pixels of 10 m, and the place of the top left corner.
GEO = {
    33550: (12, 3, (10.0, 10.0, 0.0)),
    33922: (12, 6, (0.0, 0.0, 0.0, 5e5, 5e6, 0.0)),
    34735: (3, 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633)),
    42112: (2, 0, '<GDALMetadata><Item name="A">b</Item><Item name="MAX" sample="0">9</Item></GDALMetadata>'),
    42113: (2, 0, "0"),
}


def scene(path: Path, seed: int = 0, **options: object) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, SCALE + 1, (8, 6, 4), dtype=np.uint16)
    pixels = np.kron(coarse, np.ones((9, 9, 1), np.uint16))
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", tile=(16, 16), **options)
    return pixels


def expected(model: sf.Segmenter, pixels: np.ndarray, bands: tuple[int, ...]) -> np.ndarray:
    """Labels of the model's windows on pixels that are normalised in float64."""
    config = model.config
    unit = pixels[..., [band - 1 for band in bands]] / SCALE
    image = torch.from_numpy((unit - config.mean) / config.std).permute(2, 0, 1)[None].float()
    found = sf.inference.slide(model, [image], [False], pixels.shape[:2], config.window_size, config.window_stride)
    return found.numpy()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    windowed(mean=(0.3, 0.5, 0.6), std=(0.2, 0.3, 0.4)).save_pretrained(folder / "three")
    own = {"in_channels": 4, "mean": (0.3, 0.5, 0.6, 0.4), "std": (0.2, 0.3, 0.4, 0.5)}
    windowed(**own, pixel_scale=float(SCALE), bands=(2, 1, 3, 4)).save_pretrained(folder / "four")
    return folder


@pytest.mark.parametrize("large", [False, True])
def test_predict_takes_the_named_bands(
    large: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = scene(tmp_path / "in/x.tif", extratags=[(code, *tag, True) for code, tag in GEO.items()])
    given = ["predict", tmp_path / "in", "--model", checkpoint / "three", "--dtype", "float32"]
    if large:
        monkeypatch.setattr(images, "LARGE_PIXELS", 1)
        given += ["--format", "tiff"]
    wanted = expected(sf.load(checkpoint / "three"), pixels, BANDS)
    assert len(np.unique(wanted)) > 1
    done = call(*given, *OPTIONS, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "warning" not in done.output
    (found,) = labels(tmp_path / "out").values()
    assert (found == wanted).mean() > 0.999
    if large:
        tags = tifffile.TiffFile(tmp_path / "out/labels/x.tif").pages[0].tags
        for code in (33550, 33922, 34735):
            assert tags[code].value == GEO[code][2]
        assert tags[42112].value == '<GDALMetadata><Item name="A">b</Item></GDALMetadata>'
        assert 42113 not in tags
    again = call(*given, *OPTIONS, "--out", tmp_path / "out", "--resume")
    assert "1 skipped" in again.output
    other = call(*given, "--device", "cpu", "--bands", "4,1,2", "--out", tmp_path / "out", "--resume")
    assert "1 written" in other.output
    assert "its output had other options" in other.output
    assert other.output.count("less than an eighth of the range") == 1
    refused = call(*given, "--device", "cpu", "--out", tmp_path / "new")
    assert refused.exit_code == 1
    assert "the image has 4 bands (1 to 4), and the model takes 3: name them by --bands" in refused.output


def test_the_configuration_names_bands_and_scale(checkpoint: Path, tmp_path: Path) -> None:
    pixels = scene(tmp_path / "x.tif")
    model = sf.load(checkpoint / "four")
    wanted = expected(model, pixels, (2, 1, 3, 4))
    assert (sf.predict(model, tmp_path / "x.tif").labels == wanted).mean() > 0.999
    assert (sf.predict(model, pixels).labels == wanted).mean() > 0.999
    several = sf.predict(model, [tmp_path / "x.tif"] * 2, bands=(1, 2, 3, 4))
    assert (several[1].labels == expected(model, pixels, (1, 2, 3, 4))).mean() > 0.999
    shown = several[0].image / 255 * SCALE
    np.testing.assert_allclose(shown, pixels[..., :3], atol=SCALE / 255)
    assert several[0].overlay().size == (54, 72)
    assert "4: bands 2, 1, 3, 4" in call("info", checkpoint / "four").output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes a split; a pixel is of the second class where the third band is above its half."""
    root = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("train/a", "train/b", "val/c", "val/d")):
        pixels = scene(root / "images" / f"{name}.tif", seed)
        (root / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[..., 2] > SCALE // 2).astype(np.uint8)).save(root / "labels" / f"{name}.png")
    (root / "classes.txt").write_text("low\nhigh\n")
    return root


def test_a_training_on_four_bands_is_evaluated_and_checked(data: Path, tmp_path: Path) -> None:
    options = ("--bands", "4,3,2,1", "--scale", SCALE)
    refused = call("dataset", "check", data)
    assert refused.exit_code == 1
    assert "a.tif: the image has 4 bands" in refused.output.replace("\n", "")
    checked = call("dataset", "check", data, *options)
    assert checked.exit_code == 0, checked.output
    small = "--steps 2 --batch-size 2 --crop 32 --resize 32 --window 32 --stride 32 --workers 0 --pictures 1"
    given = ["train", "--data", data, "--preset", "folder", "--out", tmp_path / "run", "--variant", "seg_m_mask_8"]
    given += [*small.split(), "--device", "cpu", "--precision", "float32", "--evaluate-every", 2]
    trained = call(*given, *options, "--mean", "0.4,0.5,0.6,0.5", "--std", "0.3,0.3,0.3,0.2")
    assert trained.exit_code == 0, trained.output
    model = sf.load(tmp_path / "run/last")
    config = model.config
    assert (config.in_channels, config.bands, config.pixel_scale) == (4, (4, 3, 2, 1), SCALE)
    assert (config.mean, config.std) == ((0.4, 0.5, 0.6, 0.5), (0.3, 0.3, 0.3, 0.2))
    pixels, target = tifffile.imread(data / "images/val/c.tif"), np.asarray(Image.open(data / "labels/val/c.png"))
    found = sf.predict(model, data / "images/val/c.tif").labels
    assert (found == expected(model, pixels, (4, 3, 2, 1))).mean() > 0.999

    scores = tmp_path / "scores.json"
    at = ("evaluate", tmp_path / "run/last", "--data", data, "--device", "cpu", "--dtype", "float32")
    evaluated = call(*at, "--resize", 54, "--no-optimize", "--json", scores)
    assert evaluated.exit_code == 0, evaluated.output
    other = np.asarray(Image.open(data / "labels/val/d.png"))
    both = [(found == target), (sf.predict(model, data / "images/val/d.tif").labels == other)]
    content = json.loads(scores.read_text())
    assert content["aacc"] == pytest.approx(np.mean(both), abs=2e-3)
    assert content["channels"] == {"count": 4, "bands": [4, 3, 2, 1], "scale": SCALE}

    report = call("check", tmp_path / "run/last", data / "images/val", "--device", "cpu", "--out", tmp_path / "x.png")
    assert report.exit_code == 0, report.output
