"""Files appear complete or not at all, with the permissions that the umask leaves."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmenter_fast.io.atomic import atomic_files, atomic_path, remove_left, write_json, write_png


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_files_are_replaced_together_when_the_block_ends(tmp_path: Path) -> None:
    folder = tmp_path / "new/folder"
    for text in ("first", "second"):
        with atomic_files(folder) as temporary:
            assert temporary.parent == folder
            for name in ("a", "b"):
                (temporary / name).write_text(text)
            assert text not in {path.read_text() for path in folder.iterdir() if path.is_file()}
        assert contents(folder) == {"a": text, "b": text}
        assert sorted(os.listdir(folder)) == ["a", "b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_block_that_raises_changes_nothing(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")

    def cut_short() -> None:
        with atomic_files(tmp_path) as temporary:
            for name in ("a", "b"):
                (temporary / name).write_text("half")
            raise error

    with pytest.raises(error):
        cut_short()
    assert contents(tmp_path) == {"a": "before"}


def test_a_new_folder_appears_with_its_tree(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "data") as temporary:
        (temporary / "images/train").mkdir(parents=True)
        (temporary / "images/train/x").write_text("pixels")
        assert not (tmp_path / "data").exists()
    assert contents(tmp_path) == {"data/images/train/x": "pixels"}
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.skipif(os.name != "posix", reason="needs a system with a umask")
def test_the_umask_is_followed(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for name, mode in (("x", 0o666), ("y", 0o600)):  # a library may write for the owner alone
            with atomic_path(tmp_path / name) as temporary:
                os.close(os.open(temporary, os.O_CREAT, mode))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_png_cut_short_leaves_nothing_and_spares_what_was_there(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(np.full((4, 4), 7, np.uint8))
    write_png(image, tmp_path / "a/x.png")
    before = (tmp_path / "a/x.png").read_bytes()

    def cut_short(image: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", cut_short)
    for name in ("x.png", "y.png"):
        with pytest.raises(error):
            write_png(image, tmp_path / "a" / name)
    assert os.listdir(tmp_path / "a") == ["x.png"]
    assert (tmp_path / "a/x.png").read_bytes() == before


def test_json_that_is_refused_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.json"
    write_json(path, {"miou": 0.5}, indent=1, allow_nan=False)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"miou": float("nan")}, allow_nan=False)
    assert path.read_text() == '{\n "miou": 0.5\n}\n'
    assert [entry.name for entry in path.parent.iterdir()] == ["scores.json"]


def test_a_folder_that_takes_no_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: str) -> None:
        raise PermissionError(13, "Permission denied", f"{options['dir']}/.saving-x")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(PermissionError, match=rf"Permission denied, nothing can be written there: '{tmp_path}'"):
        write_json(tmp_path / "new.json", {})


def test_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'"),
        atomic_path(tmp_path / "x.png"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")  # as Pillow, without a name
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs locks of folders")
def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    old, young = tmp_path / "sub/.saving-old", tmp_path / ".saving-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "x.png").touch()
    with atomic_files(tmp_path / "sub") as written:
        (written / "y").touch()
        for folder in (old, written):
            os.utime(folder, (0, 0))
        remove_left(tmp_path)
        assert (old.exists(), young.exists(), written.exists()) == (False, True, True)
    assert (tmp_path / "sub/y").exists()
