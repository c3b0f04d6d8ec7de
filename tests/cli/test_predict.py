"""``predict`` on large images and in several processes: windows, formats, signals, ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner, Result

import segmenter_fast as sf
from segmenter_fast.cli import app
from segmenter_fast.inference.resume import resume_files

MODEL = str(Path(__file__).parents[1] / "golden" / "official_mask")  # 7 classes, windows of 64
OPTIONS = ("--model", MODEL, "--device", "cpu", "--dtype", "float32")
# Bands of 8 rows, slowly, so that a signal meets a process in the middle of an image.
SLOWLY = """
import time
from segmenter_fast import cli
from segmenter_fast.inference import sliding
from segmenter_fast.inference.resume import FinishedRows
sliding._BAND_ELEMENTS = 1
append = FinishedRows.append
FinishedRows.append = lambda self, band: (append(self, band), time.sleep(0.05))
cli.main()
"""


def predict(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments), *OPTIONS])


def pixels(height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(height * 1000 + width)
    coarse = Image.fromarray(generator.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height)))


def photo(path: Path, height: int = 64, width: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels(height, width), photometric="rgb", tile=(32, 32))
    else:
        Image.fromarray(pixels(height, width)).save(path)
    return path


def labels(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted((folder / "labels").rglob("*")):
        if path.is_file():
            found[path.name] = tifffile.imread(path) if path.suffix == ".tif" else np.asarray(Image.open(path))
    return found


def ended(process: subprocess.Popen[str], seconds: float = 90) -> tuple[str, str]:
    try:
        return process.communicate(timeout=seconds)
    finally:
        process.kill()


def wait_for(process: subprocess.Popen[str], holds: object) -> None:
    deadline = time.monotonic() + 90
    while not holds():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_windows_and_their_stride_or_overlap_may_be_given(tmp_path: Path) -> None:
    source = photo(tmp_path / "x.png", 130, 150)
    result = predict(source, "--out", tmp_path, "--window", 48, "--overlap", 20, "--batch-size", 3, "--flip")
    assert result.exit_code == 0, result.output
    model = sf.load(MODEL)
    expected = sf.predict(model, source, window=48, stride=28, batch_size=3, flip=True).labels
    assert np.array_equal(labels(tmp_path)["x.png"], expected)
    expected = sf.predict(model, source, stride=model.config.window_size - 10).labels
    for option in (("--overlap", 10), ("--stride", model.config.window_size - 10)):
        assert predict(source, "--out", tmp_path, *option).exit_code == 0
        assert np.array_equal(labels(tmp_path)["x.png"], expected)


def test_the_format_may_be_given(tmp_path: Path) -> None:
    photo(tmp_path / "in/x.tif", 70, 90)
    photo(tmp_path / "in/y.png", 70, 90)
    (tmp_path / "in/z.tif").write_bytes(b"II*\0 broken")
    result = predict(tmp_path / "in", "--out", tmp_path, "--format", "tiff")
    assert result.exit_code == 1
    assert "2 written" in result.output
    assert f"failed: {tmp_path / 'in/z.tif'}: image {tmp_path / 'in/z.tif'} cannot be read" in result.stderr
    found = labels(tmp_path)
    assert list(found) == ["x.tif", "y.tif"]
    assert np.array_equal(found["x.tif"], found["y.tif"])
    with tifffile.TiffFile(tmp_path / "labels/x.tif") as file:
        assert file.pages[0].tags["ImageDescription"].value.splitlines()[0] == "class 0"
    result = predict(tmp_path / "in/x.tif", tmp_path / "in/y.png", "--out", tmp_path, "--format", "tiff", "--resume")
    assert "0 written, 2 skipped" in result.output
    assert predict(tmp_path / "in/y.png", "--out", tmp_path, "--format", "png").exit_code == 0
    assert np.array_equal(labels(tmp_path)["y.png"], found["y.tif"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--window", 0), "--window must be at least 1, got 0"),
        (("--batch-size", 0), "--batch-size must be at least 1, got 0"),
        (("--window", 32, "--overlap", 32), "--overlap must be at least 0 and below the window of 32 pixels, got 32"),
        (("--overlap", 64), "--overlap must be at least 0 and below the window of 64 pixels, got 64"),
        (("--overlap", -1), "--overlap must be at least 0 and below the window of 64 pixels, got -1"),
        (("--stride", 0), "--stride must be at least 1, got 0"),
        (("--stride", 65), "stride must be at most the window, 64, or pixels between windows get no label; got 65"),
        (("--stride", 32, "--overlap", 32), "give --stride or --overlap, not both; got --stride 32, --overlap 32"),
        (("--format", "gif"), "gif"),
    ],
)
def test_bad_options_are_named(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    result = predict(photo(tmp_path / "x.png"), "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert "Traceback" not in result.output


def test_tiff_without_tifffile_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photo(tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    result = predict(source, "--out", tmp_path, "--format", "tiff")
    assert result.exit_code == 2
    assert result.stderr == "error: labels as TIFF need tifffile: pip install 'segmenter-fast[large]'\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_process_that_is_ended_inside_an_image_is_resumed(number: int, code: int, tmp_path: Path) -> None:
    source, out = photo(tmp_path / "x.tif", 500, 70), tmp_path / "out"
    arguments = ["predict", str(source), "--out", str(out), *OPTIONS, "--format", "tiff", "--overlap", "40"]
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *arguments], stderr=subprocess.PIPE, text=True)
    rows, description = resume_files(out / "labels/x.tif")
    wait_for(process, lambda: rows.exists() and rows.stat().st_size > 70 * 50)
    process.send_signal(number)
    _, messages = ended(process)
    assert process.returncode == code, messages
    assert number == signal.SIGKILL or "interrupted: 0 of 1 images done; --resume goes on from here" in messages
    assert "Traceback" not in messages
    assert 50 < rows.stat().st_size // 70 < 500
    assert description.exists()
    assert not (out / "labels/x.tif").exists()
    result = predict(source, "--out", out, "--format", "tiff", "--overlap", 40, "--resume")
    assert result.exit_code == 0, result.output
    assert "restarted" not in result.stderr
    expected = sf.predict(sf.load(MODEL), source, stride=24).labels
    assert np.array_equal(labels(out)["x.tif"], expected)
    assert os.listdir(out / "labels") == ["x.tif"]


def test_other_options_restart_an_interrupted_image_and_say_so(tmp_path: Path) -> None:
    source, rows = photo(tmp_path / "x.tif", 90, 70), resume_files(tmp_path / "out/labels/x.tif")
    rows[0].parent.mkdir(parents=True)
    rows[0].write_bytes(bytes(70 * 20))
    rows[1].write_text('{"model": {}}')
    result = predict(source, "--out", tmp_path / "out", "--format", "tiff", "--resume")
    assert result.exit_code == 0
    expected = f"restarted: {source}: the interrupted run had another model, options, image\n"
    assert result.stderr.endswith(expected)
    assert np.array_equal(labels(tmp_path / "out")["x.tif"], sf.predict(sf.load(MODEL), source).labels)


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += ["-m", "segmenter_fast.cli", "predict", *map(str, arguments), *OPTIONS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)


def test_two_ranks_do_what_one_process_does(tmp_path: Path) -> None:
    for index in range(5):
        photo(tmp_path / f"in/{index}.png", 64 + 7 * index, 90)
    (tmp_path / "in/2.png").write_text("no image")  # rank 0's
    (tmp_path / "in/broken.png").write_text("no image")  # rank 1's, at its end
    process = torchrun(tmp_path / "in", "--out", tmp_path / "two")
    output, messages = ended(process)
    assert process.returncode == 1, messages
    assert output.count("written") == 1
    assert "4 written" in output
    assert "2 failed" in output
    for name in ("2.png", "broken.png"):
        assert messages.count(f"failed: {tmp_path / 'in' / name}: ") == 1
    assert predict(tmp_path / "in", "--out", tmp_path / "one").exit_code == 1
    one, two = labels(tmp_path / "one"), labels(tmp_path / "two")
    assert list(one) == list(two) == ["0.png", "1.png", "3.png", "4.png"]
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_killed_rank_s_share_is_redone(tmp_path: Path) -> None:
    source = photo(tmp_path / "in/000.png", 150, 150)
    for index in range(1, 24):
        (tmp_path / f"in/{index:03}.png").symlink_to(source)
    out = tmp_path / "out"
    process = torchrun(tmp_path / "in", "--out", out, "--no-overlay")
    wait_for(process, lambda: (out / "labels/001.png").exists())  # rank 1's first
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {child: Path(f"/proc/{child}/environ").read_bytes() for child in children}
    (one,) = (child for child, environment in ranks.items() if b"\0RANK=1\0" in environment)
    os.kill(int(one), signal.SIGKILL)
    _, messages = ended(process)
    assert process.returncode != 0, messages
    assert len(labels(out)) < 24
    again = predict(tmp_path / "in", "--out", out, "--no-overlay", "--resume")
    assert again.exit_code == 0, again.output
    found = labels(out)
    assert len(found) == 24
    expected = sf.predict(sf.load(MODEL), source).labels
    assert all(np.array_equal(each, expected) for each in found.values())
