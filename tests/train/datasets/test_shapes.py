"""The procedural data set: exact labels, the same scenes everywhere, classes told by shape, texture and place."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from typer.testing import CliRunner

from segmenter_fast.cli import app
from segmenter_fast.train.datasets import open_dataset
from segmenter_fast.train.datasets.drawing import outline, texture, turned
from segmenter_fast.train.datasets.shapes import BACKGROUND, BUTTON, HELD_OUT, LENGTHS, Shapes, Thing, make_folder

DIGEST = """
import hashlib
from segmenter_fast.train.datasets.shapes import Shapes
dataset = Shapes(size=64, length=12, seed=3)
print(*[hashlib.sha256(b"".join(part.tobytes() for part in dataset.read(i))).hexdigest() for i in (11, 4, 0)])
"""


def digest(dataset: Shapes, index: int) -> str:
    return hashlib.sha256(b"".join(part.tobytes() for part in dataset.read(index))).hexdigest()


def polygon(thing: Thing, side: int) -> Outline:
    """Return the object's outline in pixels from its corners, without the signed distances that draw it."""
    radius = thing.radius * side
    if thing.shape == "disc":
        angles = np.linspace(0, 2 * np.pi, 2000)
        return Outline(radius * np.stack([np.cos(angles), np.sin(angles)], 1) + (thing.x * side, thing.y * side))
    corners = {
        "square": 0.86 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
        "triangle": 1.36 * np.array([(0, -1), (0.75**0.5, 0.5), (-(0.75**0.5), 0.5)]),
        "cross": np.array(
            [
                (x * a, y * b)
                for x, y, a, b in (
                    (-1, -1, 0.2, 1.05),
                    (1, -1, 0.2, 1.05),
                    (1, -1, 0.2, 0.2),
                    (1, -1, 1.05, 0.2),
                    (1, 1, 1.05, 0.2),
                    (1, 1, 0.2, 0.2),
                    (1, 1, 0.2, 1.05),
                    (-1, 1, 0.2, 1.05),
                    (-1, 1, 0.2, 0.2),
                    (-1, 1, 1.05, 0.2),
                    (-1, -1, 1.05, 0.2),
                    (-1, -1, 0.2, 0.2),
                )
            ]
        ),
    }[thing.shape]
    axes = np.stack(turned(np.eye(2)[0], np.eye(2)[1], thing.turn))
    return Outline(radius * corners @ axes + (thing.x * side, thing.y * side))


def test_labels_are_those_of_the_topmost_outline() -> None:
    dataset, differing, shapes = Shapes(size=96, length=40, seed=5), 0, set()
    centres = np.stack(np.meshgrid(np.arange(96) + 0.5, np.arange(96) + 0.5), 2).reshape(-1, 2)
    for index in range(len(dataset)):
        expected = np.full(96 * 96, BACKGROUND)
        for thing in dataset.things(index):
            expected[polygon(thing, 96).contains_points(centres)] = thing.label
            shapes.add(thing.shape)
        differing += (expected != dataset.read(index)[1].ravel()).sum()
    assert shapes == {"disc", "square", "triangle", "cross"}
    assert differing <= 5  # of 368,640: centres within rounding of an edge


def test_scenes_depend_on_seed_and_index_alone() -> None:
    command = [sys.executable, "-c", DIGEST]
    elsewhere = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    dataset = Shapes(size=64, length=100, seed=3)
    assert elsewhere == [digest(dataset, index) for index in (11, 4, 0)]
    assert len({digest(Shapes(size=64, seed=seed), index) for seed in range(3) for index in range(10)}) == 30


def test_labels_never_change() -> None:
    """Trained models and published figures rest on these scenes."""
    labels = [Shapes(size=64, seed=seed).read(index)[1] for seed in (0, HELD_OUT) for index in range(20)]
    assert hashlib.sha256(np.stack(labels).tobytes()).hexdigest()[:16] == "0625b2a715658a43"


def test_held_out_scenes_are_never_trained_on() -> None:
    train, held_out = Shapes.of_split("train", 7, 64), Shapes.of_split("val", 7, 64)
    assert train.seed < HELD_OUT <= held_out.seed
    assert not {digest(train, index) for index in range(20)} & {digest(held_out, index) for index in range(20)}
    for seed in (-1, HELD_OUT):
        with pytest.raises(ValueError, match="seed must be within 0 to 2147483647"):
            Shapes.of_split("train", seed)
    with pytest.raises(ValueError, match="split must be train or val, got 'test'"):
        Shapes.of_split("test")


def test_every_class_is_common() -> None:
    dataset = Shapes(size=64, length=300)
    counts = np.stack([np.bincount(dataset.read(index)[1].ravel(), minlength=8) for index in range(len(dataset))])
    share, seen = counts.sum(0) / counts.sum(), (counts > 0).mean(0)
    assert len(dataset.class_names) == len(dataset.palette) == len(set(dataset.palette)) == len(share) == 8
    assert 0.4 < share[BACKGROUND] < 0.75
    assert share[1:].min() > 0.5 * share[1:].mean()
    assert share[1:].max() < 2 * share[1:].mean()
    assert seen.min() > 0.2


def test_only_the_place_tells_a_button_from_a_disc() -> None:
    dataset = Shapes(length=300)
    buttons, discs = [], []
    for index in range(len(dataset)):
        things = dataset.things(index)
        for at, thing in enumerate(things):
            if thing.shape != "disc" or thing.texture != "plain":
                continue
            hosts = [other for other in things[:at] if other.shape in ("square", "triangle") and holds(other, thing)]
            assert (thing.label == BUTTON) == bool(hosts)
            (buttons if hosts else discs).append(thing.radius)
    assert len(buttons) > 100
    assert len(discs) > 100
    assert min(discs) < np.median(buttons) < np.median(discs) < max(discs)


def holds(host: Thing, disc: Thing) -> bool:
    """Return whether a disc lies wholly on a host."""
    u, v = turned(np.array(disc.x - host.x), np.array(disc.y - host.y), host.turn)
    return outline(host.shape, u, v, host.radius) <= -disc.radius


def test_colour_tells_neither_buttons_nor_clutter() -> None:
    dataset = Shapes(length=300)
    things = [thing for index in range(len(dataset)) for thing in dataset.things(index)]
    plain = [thing for thing in things if thing.texture == "plain" and thing.shape == "disc"]
    buttons, discs = ([thing.color for thing in plain if thing.label == label] for label in (BUTTON, 1))
    assert np.abs(np.mean(buttons, 0) - np.mean(discs, 0)).max() < 0.05
    for kind in ("plain", "striped"):
        crosses = [thing for thing in things if thing.shape == "cross" and thing.texture == kind]
        assert {int(np.argmax(thing.color)) for thing in crosses} == {0, 1, 2}
        assert all(thing.label == BACKGROUND for thing in crosses)


def test_size_changes_the_resolution_only() -> None:
    small, large = Shapes(size=64, seed=1), Shapes(size=192, seed=1)
    equal = [(small.read(index)[1] == large.read(index)[1][1::3, 1::3]).mean() for index in range(10)]
    assert min(equal) == 1  # the middle one of three pixels has the centre of the small one


def test_as_a_data_set() -> None:
    dataset = Shapes(size=48, length=3, seed=9)
    pixels, labels = dataset.read(2)
    assert (len(dataset), dataset.name(2), dataset.ignore_index) == (3, "shapes-9-000002", 255)
    assert (pixels.shape, pixels.dtype, labels.shape, labels.dtype) == ((48, 48, 3), np.uint8, (48, 48), np.uint8)
    assert pixels.flags.c_contiguous
    for index in (-1, 3):
        with pytest.raises(IndexError, match="index must be within 0 to 2"):
            dataset.read(index)


@pytest.mark.parametrize(("field", "value"), [("size", 31), ("size", 5000), ("length", 0), ("seed", -1)])
def test_fields_out_of_range(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be within .* got {value}"):
        Shapes(**{field: value})


def test_unknown_shapes_and_textures() -> None:
    zero = np.zeros((1, 1), np.float32)
    with pytest.raises(ValueError, match="shape must be disc, square, triangle or cross, got 'star'"):
        outline("star", zero, zero, 1)
    with pytest.raises(ValueError, match="texture must be plain, striped or checked, got 'dotted'"):
        texture("dotted", zero, zero, 1, 0)


def test_make_writes_the_scenes_and_they_pass(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    result = CliRunner().invoke(app, ["dataset", "make", str(folder), "--images", "6", "--size", "48", "--seed", "5"])
    assert result.exit_code == 0, result.output
    assert "5 images to train on, 1 to validate with" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    for split, count in (("train", 5), ("val", 1)):
        scenes, files = Shapes.of_split(split, 5, 48), open_dataset(folder, "auto", split)
        assert len(files) == count
        assert (files.class_names, files.palette) == (scenes.class_names, scenes.palette)
        for index in range(count):
            assert files.name(index) == scenes.name(index)
            for ours, theirs in zip(files.read(index), scenes.read(index), strict=True):
                assert np.array_equal(ours, theirs)
    assert CliRunner().invoke(app, ["dataset", "check", str(folder)]).exit_code == 0


def test_make_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 2 images are needed.*, got 1"):
        make_folder(tmp_path / "new", 1)
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="exists and is not empty; name a new folder"):
        make_folder(tmp_path, 4)
    result = CliRunner().invoke(app, ["dataset", "make", str(tmp_path / "new"), "--size", "4"])
    assert result.exit_code == 2
    assert "size must be within" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_folder_may_have_more_scenes_than_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LENGTHS, "val", 1)
    assert make_folder(tmp_path / "new", 10, 32) == {"train": 8, "val": 2}
    assert len(list((tmp_path / "new/images/val").iterdir())) == 2
