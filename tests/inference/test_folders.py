"""Plans of inputs and outputs; outputs appear complete or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from segmenter_fast.inference.folders import Job, make_writable, plan
from segmenter_fast.io import walk


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def outputs(jobs: list[Job], out: Path) -> dict[str, str]:
    """source name with its folder -> place below out/labels."""
    return {"/".join(job.source.parts[-2:]): str(job.labels.relative_to(out / "labels")) for job in jobs}


def test_a_folder_keeps_its_tree(tmp_path: Path) -> None:
    touch(tmp_path / "in/a.jpg", tmp_path / "in/sub/a.PNG", tmp_path / "in/sub/deep/b.tiff")
    touch(tmp_path / "in/.hidden.png")
    jobs = plan([tmp_path / "in"], tmp_path / "out")
    assert outputs(jobs, tmp_path / "out") == {
        "in/a.jpg": "a.png",
        "sub/a.PNG": "sub/a.png",
        "deep/b.tiff": "sub/deep/b.png",
    }
    assert jobs[0].overlay == tmp_path / "out/overlays/a.png"
    assert all(job.overlay is None for job in plan([tmp_path / "in"], tmp_path / "out", overlay=False))


def test_names_depend_on_the_own_input_alone(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("x/a.jpg", "x/s/b.jpg", "y/c.jpg", "z/w/d.jpg")))
    x, y, w = tmp_path / "x", tmp_path / "y", tmp_path / "z/w/d.jpg"
    alone = [outputs(plan([path], tmp_path / "out"), tmp_path / "out") for path in (x, y, w)]
    assert alone == [{"x/a.jpg": "a.png", "s/b.jpg": "s/b.png"}, {"y/c.jpg": "c.png"}, {"w/d.jpg": "d.png"}]
    together = {name: place for names in alone for name, place in names.items()}
    for given in ([x, y, w], [w, x / "s", y, x], [x / "s/b.jpg", x, w, y]):
        assert outputs(plan(given, tmp_path / "out"), tmp_path / "out") == together


def test_inputs_of_one_name_need_a_root(tmp_path: Path) -> None:
    touch(tmp_path / "x/a.jpg", tmp_path / "y/a.jpg", tmp_path / "z/w/a.jpg")
    inputs = [tmp_path / "x", tmp_path / "y/a.jpg", tmp_path / "z/w"]
    with pytest.raises(ValueError, match=r"x/a\.jpg and .*y/a\.jpg would have one output, .*labels/a\.png: .* --root"):
        plan(inputs, tmp_path / "out")
    jobs = plan(inputs, tmp_path / "out", root=tmp_path)
    assert outputs(jobs, tmp_path / "out") == {"x/a.jpg": "x/a.png", "y/a.jpg": "y/a.png", "w/a.jpg": "z/w/a.png"}
    with pytest.raises(ValueError, match=r"root must hold all inputs, but .*x/a\.jpg is not below .*y"):
        plan(inputs, tmp_path / "out", root=tmp_path / "y")


def test_one_stem_with_several_suffixes(tmp_path: Path) -> None:
    touch(*(tmp_path / "in" / name for name in ("a.jpg", "a.png", "a.jpg.png", "b.png")), tmp_path / "in/sub/c.png")
    with pytest.raises(ValueError, match=r"in/a\.jpg and .*in/a\.png would have one output, .*: --keep-suffix"):
        plan([tmp_path / "in"], tmp_path / "out")
    jobs = plan([tmp_path / "in"], tmp_path / "out", keep_suffix=True)
    assert outputs(jobs, tmp_path / "out") == {
        "in/a.jpg": "a.jpg.png",
        "in/a.png": "a.png.png",
        "in/a.jpg.png": "a.jpg.png.png",
        "in/b.png": "b.png.png",
        "sub/c.png": "sub/c.png.png",
    }


def test_linked_folders_are_walked_and_circles_end(tmp_path: Path) -> None:
    touch(tmp_path / "in/a.jpg", tmp_path / "other/b.jpg", tmp_path / "other/deep/c.jpg", tmp_path / "in/.git/d.png")
    (tmp_path / "in/link").symlink_to(tmp_path / "other")
    (tmp_path / "in/again").symlink_to(tmp_path / "other")
    (tmp_path / "other/deep/circle").symlink_to(tmp_path / "in")
    (tmp_path / "other/deep/up").symlink_to(tmp_path / "other")
    jobs = plan([tmp_path / "in"], tmp_path / "out")
    names = ("a", "again/b", "again/deep/c", "link/b", "link/deep/c")
    assert sorted(str(job.labels.relative_to(tmp_path / "out/labels")) for job in jobs) == [f"{n}.png" for n in names]


def test_files_that_are_not_read_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(*(tmp_path / "in" / name for name in ("a.jpg", "b.txt", "c.txt", "d.HEIC", "e", ".hidden")))
    monkeypatch.setattr(walk, "IMAGE_SUFFIXES", tuple(set(walk.IMAGE_SUFFIXES) - set(walk.HEIF_SUFFIXES)))
    told = "4 files are not read: 1 (.heic, needs pip install pillow-heif: d.HEIC), 2 (.txt, no known image: b.txt), "
    with pytest.warns(UserWarning, match=re.escape(f"{told}1 (no suffix: e)")):
        plan([tmp_path / "in"], tmp_path / "out")


def test_an_input_given_twice_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "in/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert len(plan([Path("in"), Path("in/a.jpg"), tmp_path / "in/../in/a.jpg"], Path("out"))) == 1


def test_outputs_inside_the_input_are_no_inputs(tmp_path: Path) -> None:
    touch(
        tmp_path / "in/a.jpg",
        tmp_path / "in/labels/a.png",
        tmp_path / "in/overlays/a.png",
        tmp_path / "in/s/labels/b.png",
    )
    jobs = plan([tmp_path / "in"], tmp_path / "in")
    assert [str(job.source.relative_to(tmp_path / "in")) for job in jobs] == ["a.jpg", "s/labels/b.png"]


def test_what_cannot_be_planned_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"input .*nowhere does not exist"):
        plan([tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty; known suffixes are \.jpg"):
        plan([tmp_path / "empty"], tmp_path / "out")
    touch(tmp_path / "out/labels/a.png")
    with pytest.raises(ValueError, match=r"labels/a\.png is itself an input"):
        plan([tmp_path / "out/labels/a.png"], tmp_path / "out")


def test_files_that_are_named_need_no_known_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "photo.heic")
    assert outputs(plan([tmp_path / "photo.heic"], tmp_path / "out"), tmp_path / "out").popitem()[1] == "photo.png"


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    make_writable(tmp_path / "new/out")
    assert sorted(os.listdir(tmp_path / "new/out")) == ["labels", "overlays"]
    assert not list(tmp_path.rglob("*.part"))
    left = tmp_path / "new/out/labels/sub/.saving-x"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    make_writable(tmp_path / "new/out")
    assert left.exists() == (os.name != "posix")  # of a process that was killed
    touch(tmp_path / "file")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(OSError, match=rf"output folder {out} cannot be written"):
            make_writable(out)
