"""The commands as users run them: outputs, messages, exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import segmenter_fast as sf
from segmenter_fast.cli import app
from segmenter_fast.config import PUBLISHED_MIOU
from segmenter_fast.io import images

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = str(GOLDEN / "official_mask")  # 7 classes, windows of 64


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def predict(*arguments: object, dtype: str = "float32") -> Result:
    return call("predict", *arguments, "--model", MODEL, "--device", "cpu", "--dtype", dtype)


def photo(path: Path, height: int = 64, width: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(height * 1000 + width)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    coarse.resize((width, height)).save(path)
    return path


def labels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_become_labels_and_overlays(dtype: str, tmp_path: Path) -> None:
    source, out = photo(tmp_path / "x.png", 70, 90), tmp_path / "out"
    result = predict(source, "--out", out, "--scales", "1,1.5", "--flip", dtype=dtype)
    assert result.exit_code == 0, result.output
    assert "1 written" in result.output
    assert "images/s" in result.output
    model = sf.load(MODEL).to(getattr(torch, dtype))
    expected = sf.predict(model, source, scales=(1.0, 1.5), flip=True)
    assert np.array_equal(labels(out / "labels/x.png"), expected.labels)
    with Image.open(out / "overlays/x.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected.overlay()))
    assert tree(out) == ["labels/x.png", "overlays/x.png"]


def test_a_folder_with_broken_files_goes_on_and_ends_with_exit_code_1(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    photo(folder / "a.png")
    whole = photo(folder / "b.jpg", 200, 200).read_bytes()
    (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "c.png").write_text("no image")
    Image.new("F", (8, 8)).save(folder / "d.tiff")
    photo(folder / "sub/a.png")
    result = predict(folder, "--out", out, "--no-overlay")
    assert result.exit_code == 1
    assert "2 written" in result.output
    assert "3 failed" in result.output
    for name, reason in {"b.jpg": "cannot be read", "c.png": "cannot be read", "d.tiff": "mode F"}.items():
        lines = [line for line in result.stderr.splitlines() if line.startswith(f"failed: {folder / name}")]
        assert len(lines) == 1
        assert reason in lines[0]
    assert "Traceback" not in result.output
    assert tree(out) == ["labels/a.png", "labels/sub/a.png"]


def test_resume_does_what_is_missing_only(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "b.png", "c.png"):
        photo(folder / name)
    assert predict(folder / "a.png", "--out", out).exit_code == 0
    (out / "labels/b.png").write_bytes((out / "labels/a.png").read_bytes())  # b has no overlay yet
    before = (out / "labels/a.png").stat().st_mtime_ns
    result = predict(folder, "--out", out, "--resume")
    assert result.exit_code == 0
    assert "2 written" in result.output
    assert "1 skipped" in result.output
    assert (out / "labels/a.png").stat().st_mtime_ns == before
    assert "0 written, 3 skipped, 0 failed" in predict(folder, "--out", out, "--resume").output
    assert "3 written" in predict(folder, "--out", out).output


def test_inputs_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    first, second = photo(tmp_path / "x/a.png", 64, 64), photo(tmp_path / "y/a.png", 70, 65)
    assert predict(first, second, "--out", tmp_path / "out").exit_code == 0
    assert labels(tmp_path / "out/labels/x/a.png").shape == (64, 64)
    assert labels(tmp_path / "out/labels/y/a.png").shape == (70, 65)


def test_bad_usage_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    source = photo(tmp_path / "x.png")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for arguments, message in {
        (source, "--out", tmp_path / "file"): f"error: output folder {tmp_path / 'file'} cannot be written",
        (tmp_path / "empty", "--out", tmp_path / "o"): f"error: no images in {tmp_path / 'empty'}",
        (tmp_path / "absent", "--out", tmp_path / "o"): f"error: input {tmp_path / 'absent'} does not exist",
    }.items():
        result = predict(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(message)
        assert len(result.stderr.splitlines()) == 1
    for arguments in (("--out", tmp_path), (source,), (source, "--out", tmp_path / "o", "--scales", "1,big")):
        result = predict(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
    result = call("predict", source, "--out", tmp_path / "o", "--model", tmp_path / "absent")
    assert result.exit_code == 2
    assert "absent" in result.stderr
    assert not list((tmp_path / "o").rglob("*.png"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    result = call("predict", photo(tmp_path / "x.png"), "-o", tmp_path / "o", "-m", MODEL, "--device", "cuda")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: device cuda is not there")


def test_random_weights_are_called_random() -> None:
    result = call("info", "seg_t_linear_16")
    assert result.exit_code == 0
    assert "RANDOM weights" in result.stderr
    assert "RANDOM" not in call("info", MODEL).stderr


def test_an_interrupt_between_files_leaves_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png", "c.png"):
        photo(tmp_path / "in" / name)
    real = images.open_raster

    def interrupted(image: Path) -> images.Raster:
        if image.name == "b.png":
            raise KeyboardInterrupt
        return real(image)

    monkeypatch.setattr(images, "open_raster", interrupted)
    result = predict(tmp_path / "in", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "interrupted: 1 of 3 images done; --resume goes on from here" in result.stderr
    assert "Traceback" not in result.output
    assert tree(tmp_path / "out") == ["labels/a.png", "overlays/a.png"]


def test_control_c_ends_the_process_cleanly(tmp_path: Path) -> None:
    source, out = photo(tmp_path / "in/0.png", 400, 400), tmp_path / "out"
    for index in range(1, 300):
        (tmp_path / f"in/{index}.png").symlink_to(source)
    # a parent that ignores interrupts, such as a shell's background job, would pass that on
    program = "import signal, segmenter_fast.cli as cli; signal.signal(2, signal.default_int_handler); cli.main()"
    arguments = ["predict", str(tmp_path / "in"), "--out", str(out), "--model", MODEL, "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "labels").is_dir() or not tree(out / "labels"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert "interrupted: " in messages
    assert "Traceback" not in messages
    written = [path for path in out.rglob("*") if path.is_file()]
    assert all(path.suffix == ".png" for path in written)
    for path in written:
        with Image.open(path) as image:
            image.load()


def test_info_says_what_a_checkpoint_is() -> None:
    result = call("info", GOLDEN / "official_deit_linear")
    assert result.exit_code == 0
    for fact in ("the official program", "class, distillation", "64 x 64, patches of 16", "linear", "0.485", "7: "):
        assert fact in result.output
    parameters = sum(parameter.numel() for parameter in sf.load(GOLDEN / "official_deit_linear").parameters())
    assert f"{parameters:,}" in result.output


def test_variants_lists_all_with_the_published_figures() -> None:
    result = call("variants")
    assert result.exit_code == 0
    rows = {cells[1].strip(): cells for line in result.output.splitlines() if len(cells := line.split("│")) > 3}
    assert set(sf.VARIANTS) == set(rows)
    for name, figures in PUBLISHED_MIOU.items():
        assert " / ".join(map(str, figures)) in rows[name][4]
    assert "6.7 M" in rows["seg_t_mask_16"][2]
    assert "authors" in result.output


def test_version_and_help() -> None:
    assert call("--version").output == f"segmenter-fast {sf.__version__}\n"
    for command in ("predict", "info", "variants"):
        assert command in call("--help").output
        assert call(command, "--help").exit_code == 0
