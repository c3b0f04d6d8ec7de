"""Label images of colours, the reduced zero label and pages: the class of every pixel, and every way to be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmenter_fast import SegmenterConfig
from segmenter_fast.train.datasets import SampleError, open_dataset
from segmenter_fast.train.datasets.class_lists import ReadOptions, read_classes
from segmenter_fast.train.datasets.colors import ColorTable, UnknownColorError, read_palette
from segmenter_fast.train.datasets.findings import Findings, check_files, sample_warnings
from segmenter_fast.train.forms import find_photos
from support.folders import HEIGHT, WIDTH, write_folder

COLORS = [[70, 130, 180], [0, 60, 160], [237, 201, 175]]
VOID = [0, 0, 0]
CSV = "name,r,g,b\nsky,70,130,180\nvoid,0,0,0\nsea,0,60,160\nsand,237,201,175\n"


def write_colors(root: Path, mode: str = "RGB", classes: object = None) -> np.ndarray:
    """Make the labels of a folder colours; return the class of each pixel, 255 for void."""
    write_folder(root, classes=None if classes else "sky\nsea\nsand\n")
    if classes:
        (root / "classes.json").write_text(json.dumps(classes))
    expected = np.resize(np.array([0, 2, 1, 255, 1], np.uint8), (HEIGHT, WIDTH))
    pixels = np.array([*COLORS, VOID], np.uint8)[np.where(expected == 255, 3, expected)]
    for path in (root / "labels").rglob("*.png"):
        Image.fromarray(pixels).convert(mode).save(path)
    return expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("told", ["json", "csv"])
def test_colours_become_classes(mode: str, told: str, tmp_path: Path) -> None:
    classes = {"classes": ["sky", "sea", "sand"], "palette": COLORS, "ignored": [VOID]} if told == "json" else None
    expected = write_colors(tmp_path / "data", mode, classes)
    (tmp_path / "colors.csv").write_text(CSV)
    options = ReadOptions(None if classes else tmp_path / "colors.csv")
    dataset = open_dataset(tmp_path / "data", options=options)
    assert np.array_equal(dataset.read(0)[1], expected)
    assert dataset.palette == tuple(map(tuple, COLORS))
    findings = Findings(dataset)
    for checked in check_files(dataset):
        findings.add(checked)
    counts = [int((expected == place).sum()) for place in range(3)]
    assert findings.pixels.tolist() == [3 * count for count in counts]
    assert (findings.ignored, findings.problems) == (3 * int((expected == 255).sum()), [])


def test_an_unknown_colour_is_named_with_its_pixels_and_the_nearest(tmp_path: Path) -> None:
    write_colors(tmp_path, classes={"classes": ["sky", "sea", "sand"], "palette": COLORS, "ignored": [VOID]})
    path = tmp_path / "labels/train/b.png"
    pixels = np.array(Image.open(path))
    pixels[0, :5], pixels[1, 0] = (70, 130, 183), (9, 9, 9)
    Image.fromarray(pixels).save(path)
    dataset = open_dataset(tmp_path)
    message = (
        f"labels {path} hold 5 pixels of colour (70, 130, 183), and 1 more unknown colours; the nearest that is known "
        "is sky (70, 130, 180)"
    )
    with pytest.raises(UnknownColorError) as raised:
        dataset.read(0)
    assert str(raised.value) == message
    assert [problem for checked in check_files(dataset) for problem in checked.problems] == [message]
    with pytest.raises(ValueError, match="hold 5 pixels of colour"):
        sample_warnings(dataset)
    Image.open(path).save(path.with_suffix(".jpg"))
    path.with_suffix(".jpg").rename(path)
    with pytest.raises(UnknownColorError, match="lossy compression, such as JPEG, changes colours"):
        dataset.read(0)


def test_palette_images_keep_their_indices(tmp_path: Path) -> None:
    write_colors(tmp_path, classes={"classes": ["sky", "sea", "sand"], "palette": COLORS})
    labels = Image.fromarray(np.resize(np.array([2, 0, 255], np.uint8), (HEIGHT, WIDTH)))
    labels.putpalette(COLORS[1] + COLORS[2] + COLORS[0] + VOID * 253)  # colours of other classes, which do not count
    labels.save(tmp_path / "labels/train/b.png")
    assert np.array_equal(open_dataset(tmp_path).read(0)[1], np.resize([2, 0, 255], (HEIGHT, WIDTH)))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            None,
            r"have mode RGB; .* grey or palette PNG or TIFF; colours need a palette in classes\.json, or as --palette",
        ),
        (
            {"classes": ["sky", "sea"], "palette": [[1, 1, 1], [1, 1, 1]]},
            r"its colours cannot be told apart: sky and sea have one colour in the palette, \(1, 1, 1\)",
        ),
        (
            {"classes": ["sky", "sea"], "palette": COLORS[:2], "values": [0, 255], "ignored": [VOID]},
            "colours that are ignored need a value that no class has",
        ),
        (
            {"classes": ["sky", "sea"], "palette": COLORS[:2], "reduce_zero_label": True},
            "reduce_zero_label says nothing: list those that do not count as ignored",
        ),
    ],
)
def test_colours_without_a_meaning_are_refused(classes: object, message: str, tmp_path: Path) -> None:
    write_colors(tmp_path, classes=classes)
    with pytest.raises(SampleError, match=message):
        open_dataset(tmp_path).read(0)
    findings = Findings(open_dataset(tmp_path))
    for checked in check_files(findings.dataset):
        findings.add(checked)
    assert len(findings.problems) == 3
    assert sum("; " in problem.partition("needed: ")[2] for problem in findings.problems) == 1  # the reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CSV, {"sky": (70, 130, 180), "void": (0, 0, 0), "sea": (0, 60, 160), "sand": (237, 201, 175)}),
        ("# label:color_rgb:parts:actions\nbackground:0,0,0::\nclass 1:128,0,0::\n", {"background": (0, 0, 0)}),
        ("class 1, 128, 0, 0\nclass 2;0;128;0\n", {"class 1": (128, 0, 0), "class 2": (0, 128, 0)}),
    ],
)
def test_palette_files(text: str, expected: dict[str, tuple[int, int, int]], tmp_path: Path) -> None:
    (tmp_path / "p").write_text(text)
    assert read_palette(tmp_path / "p").items() >= expected.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sky,1,2,3\nsea,1,2\n", "line 2 must be NAME,R,G,B"),
        ("sky,1,2,3\nsea,1,2,256\n", "line 2 must be NAME,R,G,B .* got 'sea,1,2,256'"),
        ("sky,1,2,3\nsky,1,2,4\n", "line 2 must be NAME,R,G,B .* a name of its own"),
        ("name,r,g,b\n", "must hold a line NAME,R,G,B for each class, got none"),
        ("sky,1,2,3\nsea,4,5,6\n", "has no colour for sand; it has some for sky, sea"),
    ],
)
def test_wrong_palette_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"p\.csv.*{message}"):
        open_dataset(tmp_path / "data", options=ReadOptions(tmp_path / "p.csv"))


def test_a_palette_is_the_class_list_of_a_folder_without_one(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(CSV)
    classes = read_classes(tmp_path, ReadOptions(tmp_path / "p.csv"))
    assert (classes.class_names, classes.palette[1]) == (("sky", "void", "sea", "sand"), (0, 0, 0))


@pytest.mark.parametrize("told", ["json", "option"])
def test_reduced_zero_label_is_that_of_mmsegmentation(told: str, tmp_path: Path) -> None:
    write_folder(tmp_path, values=(0, 1, 2, 3, 255), classes=None if told == "json" else "sky\nsea\nsand\n")
    if told == "json":
        classes = {"classes": ["sky", "sea", "sand"], "reduce_zero_label": True}
        (tmp_path / "classes.json").write_text(json.dumps(classes))
    dataset = open_dataset(tmp_path, options=ReadOptions(reduce_zero_label=told == "option"))
    assert np.array_equal(dataset.read(0)[1], np.resize([255, 0, 1, 2, 255], (HEIGHT, WIDTH)))
    assert dataset.label_values == (1, 2, 3)
    photos = find_photos([tmp_path / "images/val"], tmp_path / "labels/val", SegmenterConfig(num_classes=3))
    with pytest.raises(ValueError, match="hold 3, but classes are 0 to 2"):
        photos.read(0)
    for config, options in (
        (SegmenterConfig(num_classes=3), ReadOptions(reduce_zero_label=True)),
        (SegmenterConfig(num_classes=3, label_values=(1, 2, 3)), None),
    ):
        photos = find_photos([tmp_path / "images/val"], tmp_path / "labels/val", config, options)
        assert np.array_equal(photos.read(0)[1], np.resize([255, 0, 1, 2, 255], (HEIGHT, WIDTH)))


def test_photos_have_the_colours_of_the_model(tmp_path: Path) -> None:
    expected = write_colors(tmp_path)
    names, palette = ("sky", "sea", "sand"), tuple(map(tuple, COLORS))
    (tmp_path / "p.csv").write_text(CSV)
    config = SegmenterConfig(num_classes=3, class_names=names, palette=palette)
    photos = find_photos([tmp_path / "images/val"], tmp_path / "labels/val", config, ReadOptions(tmp_path / "p.csv"))
    assert np.array_equal(photos.read(0)[1], expected)
    photos = find_photos([tmp_path / "images/val"], tmp_path / "labels/val", config)
    with pytest.raises(UnknownColorError, match=r"pixels of colour \(0, 0, 0\); the nearest that is known is sea"):
        photos.read(0)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"classes": ["a", "b"], "values": [1, 2], "reduce_zero_label": True}, "and false beside values, got True"),
        ({"classes": ["a", "b"], "reduce_zero_label": "yes"}, "must be true or false, and false beside values, got"),
        ({"classes": [f"c{i}" for i in range(255)], "reduce_zero_label": True}, "must hold 1 to 254 classes"),
        ({"classes": ["a"], "reduce_zero_labels": True}, "entry 'reduce_zero_labels'; did you mean reduce_zero_label?"),
        ({"classes": ["a"], "ignored": [[0, 0, 0]]}, "ignored must be a list of colours .* beside a palette"),
        ({"classes": ["a"], "palette": [[1, 2, 3]], "ignored": [0]}, "ignored must be a list of colours"),
    ],
)
def test_wrong_class_files_are_named(classes: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(ValueError, match=rf"classes\.json.*{message}"):
        read_classes(tmp_path)


def test_options_are_for_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no files that a palette"):
        open_dataset("shapes", options=ReadOptions(reduce_zero_label=True))
    with pytest.raises(ValueError, match="for the kind folder; cityscapes has labels of its own"):
        open_dataset(tmp_path, "cityscapes", options=ReadOptions(reduce_zero_label=True))


def test_pages_of_images_and_labels(tmp_path: Path) -> None:
    write_folder(tmp_path)
    image, labels = tmp_path / "images/train/b.jpg", tmp_path / "labels/train/b.png"
    image.unlink()
    layers = [Image.new("RGB", (WIDTH, HEIGHT), (20 * page, 0, 0)) for page in range(3)]
    layers[0].save(tmp_path / "images/train/b.tif", save_all=True, append_images=layers[1:])
    layers = [Image.new("L", (WIDTH, HEIGHT), page) for page in range(3)]
    dataset = open_dataset(tmp_path)
    place = [dataset.name(index) for index in range(3)].index("b")
    assert sample_warnings(dataset) == [
        f"{tmp_path / 'images/train/b.tif'} has 3 pages; the first is read, --page 1 is the second"
    ]
    dataset = open_dataset(tmp_path, options=ReadOptions(page=2))
    pixels, found = dataset.read(place)
    assert (pixels == (40, 0, 0)).all()
    assert found.max() == 255  # the label file has one page, which all pages of the image share
    layers[0].save(tmp_path / "stack.tif", save_all=True, append_images=layers[1:])
    (tmp_path / "stack.tif").rename(labels)
    assert (dataset.read(place)[1] == 2).all()
    assert sample_warnings(dataset) == []
    with pytest.raises(SampleError, match=r"b\.png cannot be read: it has the pages 0 to 2 and no page 3"):
        open_dataset(tmp_path, options=ReadOptions(page=3)).read(place)


def test_table_of_colours() -> None:
    table = ColorTable({(255, 0, 0): 4, (0, 0, 1): 9, (0, 1, 0): 255}, {(255, 0, 0): "a", (0, 0, 1): "b"})
    pixels = np.array([[[0, 0, 1], [255, 0, 0], [0, 1, 0]]], np.uint8)
    assert table.read(pixels, Path("x")).tolist() == [[9, 4, 255]]
    assert table.ignored == [(0, 1, 0)]
