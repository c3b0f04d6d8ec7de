"""``segmenter-fast predict`` that is interrupted and resumed, and in several processes."""

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
from PIL import Image

import segmenter_fast as sf
from segmenter_fast.inference.resume import resume_files
from segmenter_fast.io import images
from segmenter_fast.io.channels import Channels
from support.predict import MODEL, OPTIONS, labels, photo, predict, tree

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


def test_an_interrupt_between_files_leaves_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png", "c.png"):
        photo(tmp_path / "in" / name)
    real = images.open_raster

    def interrupted(image: Path, page: int | None, channels: Channels) -> images.Raster:
        if image.name == "b.png":
            raise KeyboardInterrupt
        return real(image, page, channels)

    monkeypatch.setattr(images, "open_raster", interrupted)
    result = predict(tmp_path / "in", "--out", tmp_path / "out", "--batch-size", 1)
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
    expected = f"restarted: {source}: the interrupted run had another model and other options and another image\n"
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
    for index in range(1, 300):  # several bursts for each of the ranks
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
    assert len(labels(out)) < 300
    again = predict(tmp_path / "in", "--out", out, "--no-overlay", "--resume")
    assert again.exit_code == 0, again.output
    found = labels(out)
    assert len(found) == 300
    expected = sf.predict(sf.load(MODEL), source).labels
    assert all(np.array_equal(each, expected) for each in found.values())
