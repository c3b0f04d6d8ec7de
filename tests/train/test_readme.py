"""Every command of the page on training runs as written, one after another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "train" / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def test_the_page_goes_from_data_to_labels() -> None:
    wanted = ["dataset make", "dataset check", "train", "train", "plot", "evaluate", "evaluate", "predict"]
    assert len(COMMANDS) == len(wanted)
    for command, name in zip(COMMANDS, wanted, strict=True):
        assert command.startswith(f"segmenter-fast {name} ")


def test_commands_run_as_written(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in COMMANDS:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            timeout=600,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "curves.png").stat().st_size > 0
    labels = list((tmp_path / "predictions" / "labels").rglob("*.png"))
    assert len(labels) == len(list((tmp_path / "data" / "images" / "val").iterdir())) > 0
