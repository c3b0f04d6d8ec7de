"""Data as people have it: links, other files, EXIF, binary masks, few bits, and what ``dataset check`` says of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from segmenter_fast.train.datasets import SampleError, open_dataset
from segmenter_fast.train.datasets.findings import sample_warnings
from segmenter_fast.train.datasets.layouts import open_files
from segmenter_fast.train.datasets.pairs import orientation, read_pixels, read_values
from support.folders import HEIGHT, WIDTH, write_folder, write_pair
from support.predict import call


def check(root: Path, out: Path) -> dict[str, object]:
    """Figures of both splits."""
    result = call("dataset", "check", root, "--json", out, "--overwrite")
    assert result.exit_code in (0, 1), result.output
    return json.loads(out.read_text())["splits"]


def test_linked_folders_count_and_circles_end(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    for kind, ending in (("images", "jpg"), ("labels", "png")):
        write_pair(tmp_path / "o/images/x.jpg", tmp_path / "o/labels/x.png", (0, 1, 2))
        (root / kind / "train/link").symlink_to(tmp_path / "o" / kind)
        (tmp_path / "o" / kind / "circle").symlink_to(root / kind / "train")
        assert (root / kind / f"train/link/x.{ending}").exists()
    dataset = open_dataset(root)
    assert [dataset.name(index) for index in range(len(dataset))] == ["b", "c", "link/x", "sub/a"]
    assert check(root, tmp_path / "x.json")["train"]["pairs"] == 4


def test_the_table_has_all_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    root = write_folder(tmp_path / "data", (0, 0, 2, 255))
    for name in ("images/train/x.xyz", "images/train/IMG_1", "images/train/sub/a.txt", "labels/train/y.json"):
        (root / name).touch()
    Image.new("L", (WIDTH, HEIGHT), 9).save(root / "labels/val/d.png")
    result = call("dataset", "check", root, "--json", tmp_path / "x.json")
    assert result.exit_code == 1
    rows = {
        cells[1].strip(): cells[2].strip()
        for cells in map(lambda x: x.split("│"), result.stdout.splitlines())
        if cells[2:]
    }
    assert (rows["images"], rows["labels"], rows["pairs"]) == ("3", "3", "3")
    assert rows["not read: no suffix"] == "1"
    assert rows["not read: .txt, no known image"] == "1"
    assert rows["not read: .json, no known image, among labels"] == "1"
    assert rows["sizes"] == f"{WIDTH} x {HEIGHT} (3)"
    values = np.resize([0, 0, 2, 255], (HEIGHT, WIDTH))
    pixels = {label: 3 * int((values == label).sum()) for label in (0, 2, 255)}
    share = pixels[0] / (3 * values.size)
    assert rows["sky"].split() == [f"{pixels[0]}", f"{share:.1%}", "█" * round(10 * share)]
    found = json.loads((tmp_path / "x.json").read_text())["splits"]
    assert found["train"]["pixels"] == {"sky": pixels[0], "sea": 0, "sand": pixels[2]}
    assert found["train"]["ignored_pixels"] == pixels[255]
    assert found["train"]["values"] == {str(value): count for value, count in pixels.items()}
    assert found["train"]["ignored_files"]["no suffix"] == [str(root / "images/train/IMG_1")]
    assert (found["train"]["files_with_other_values"], found["val"]["files_with_other_values"]) == (0, 1)
    assert "warning: train: no pixel of sea; the label files hold 0, 2, 255" in result.stderr
    assert call("dataset", "check", root, "--json", tmp_path / "x.json").exit_code == 2


def test_binary_masks_are_recognised_and_read_as_two_classes(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", (0, 255), "no\nyes\n")
    told = 'no pixel of yes in 3 of 3 label files; the label files hold 0, 255: if 255 is a class, write {"classes": '
    (warning,) = sample_warnings(open_files(root, "folder", "train"))
    assert warning == told + '["no", "yes"], "values": [0, 255]} as classes.json'
    assert check(root, tmp_path / "x.json")["train"]["warnings"]
    (root / "classes.txt").unlink()
    (root / "classes.json").write_text('{"classes": ["no", "yes"], "values": [0, 255]}')
    dataset = open_files(root, "folder", "train")
    assert sample_warnings(dataset) == []
    assert np.array_equal(dataset.read(0)[1], np.resize([0, 1], (HEIGHT, WIDTH)))
    Image.new("L", (WIDTH, HEIGHT), 1).save(root / "labels/train/b.png")
    with pytest.raises(ValueError, match="hold 1, but classes are 0 to 255"):
        dataset.read(0)
    for values in ("[0]", "[0, 0]", "[0, 256]", '"x"'):
        (root / "classes.json").write_text(f'{{"classes": ["no", "yes"], "values": {values}}}')
        with pytest.raises(ValueError, match="values must be a list of 2 different values, each 0 to 255"):
            open_files(root, "folder", "train")


@pytest.mark.parametrize(
    ("values", "classes", "told"),
    [
        ((255,), "no\nyes\n", "no pixel of any class in 3 of 3 label files; the label files hold 255"),
        ((0,), "all\n", "one class only in 3 of 3 label files; the label files hold 0"),
        ((1,), "a\nb\nc\n", "no pixel of a, c in 3 of 3 label files; the label files hold 1"),
    ],
)
def test_data_without_anything_to_learn_is_told(
    values: tuple[int, ...], classes: str, told: str, tmp_path: Path
) -> None:
    root = write_folder(tmp_path, values, classes)
    assert sample_warnings(open_files(root, "folder", "train")) == [told]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_gives_the_stored_values(bits: int, tmp_path: Path) -> None:
    import struct
    import zlib

    root, top = write_folder(tmp_path, (0, 1), "\n".join(map(str, range(16)))), 2**bits
    values = np.resize(np.arange(top, dtype=np.uint8), (HEIGHT, WIDTH))
    rows = np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(HEIGHT, -1)
    data = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    (root / "labels/train/b.png").write_bytes(png)
    assert np.array_equal(open_dataset(root).read(0)[1], values)


def turned(path: Path, tag: int) -> None:
    with Image.open(path) as opened:
        pixels = np.asarray(opened)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    Image.fromarray(pixels).save(path, exif=exif)


def test_labels_obey_their_own_orientation(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    before = open_dataset(root).read(0)[1]
    for name in ("images/train/b.jpg", "labels/train/b.png"):
        turned(root / name, 6)
    image, labels = open_dataset(root).read(0)
    assert image.shape[:2] == labels.shape == (WIDTH, HEIGHT)
    assert np.array_equal(labels, np.rot90(before, -1))
    found = check(root, tmp_path / "x.json")["train"]
    assert found["turned_by_exif"] == 1
    assert found["warnings"] == found["problems"] == []


def test_images_turned_without_their_labels_are_told(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    turned(root / "images/train/b.jpg", 3)
    found = check(root, tmp_path / "x.json")["train"]
    assert found["warnings"] == ["EXIF turns 1 image another way than the labels: look at some of them"]
    turned(root / "images/train/b.jpg", 6)
    with pytest.raises(SampleError, match=r"are 9 x 6; EXIF turns the image by orientation 6, the labels by 1"):
        open_dataset(root).read(0)


def test_pipes_and_dangling_links_are_problems(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    (root / "labels/train/b.png").unlink()
    os.mkfifo(root / "labels/train/b.png")
    (root / "images/train/z.png").symlink_to("nowhere")
    problems = "\n".join(check(root, tmp_path / "x.json")["train"]["problems"])
    assert "labels/train/b.png cannot be read: it is no regular file" in problems
    assert "images/train/z.png does not exist" in problems


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "a.png"
    os.mkfifo(pipe)
    assert orientation(pipe) == 1
    for read in (read_pixels, read_values):
        with pytest.raises(SampleError, match="no regular file"):
            read(pipe)
