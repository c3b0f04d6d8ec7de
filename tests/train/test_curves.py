"""Curves from logs, and the command that draws them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from segmenter_fast.cli import app
from segmenter_fast.train.curves import Curves, draw_curves, read_curves, running_mean
from segmenter_fast.train.logs import LOG


def run(folder: Path, scale: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    records = [{"kind": "step", "step": step, "loss": scale / step} for step in range(1, 41)]
    records[3]["loss"] = None  # was not finite
    records += [{"kind": "evaluation", "step": step, "miou": step / 100} for step in (20, 40, 40)]
    records += [{"kind": "checkpoint", "step": 40, "message": "saved"}]
    records[-2]["miou"] = 0.5
    (folder / LOG).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(2**24)}


def test_curves_hold_what_was_logged(tmp_path: Path) -> None:
    curves = read_curves(run(tmp_path / "first"))
    assert curves.name == "first"
    assert curves.loss[10] == 0.1
    assert 4 not in curves.loss
    assert curves.miou == {20: 0.2, 40: 0.5}
    assert read_curves(tmp_path / "first" / LOG) == curves


def test_a_running_mean() -> None:
    assert running_mean([2.0] * 100) == pytest.approx([2.0] * 100)
    assert running_mean([1.0, 3.0]) == [1.0, 3.0]
    noisy = running_mean([0.0, 1.0] * 100)
    assert 0.3 < min(noisy[50:]) < max(noisy[50:]) < 0.7
    assert running_mean([]) == []


def test_the_command_draws_every_run(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a" / "run"), run(tmp_path / "b" / "run", 2.0)]
    out = tmp_path / "plots" / "curves.png"
    result = CliRunner().invoke(app, ["plot", *map(str, runs), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "run (1): 39 losses, last 0.025; 2 evaluations, best mIoU 0.5000 at step 40" in result.output
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colours(out)  # a colour a run
    draw_curves([read_curves(runs[0])], out)
    assert (0xFF, 0x7F, 0x0E) not in colours(out)
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no run: it has no log.jsonl"),
        (["empty"], "no loss and no evaluation"),
        (["good", "--out", "x.svg"], "must be a .png file, got x.svg"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / LOG).write_text("")
    result = CliRunner().invoke(app, ["plot", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("points", [1, 2, 5])
def test_short_runs_have_marked_points_whole_steps_and_the_best_score(
    points: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = Curves("short", {step: 1 / step for step in range(1, points + 1)}, {points: 0.031})
    kept: list[Figure] = []
    monkeypatch.setattr("matplotlib.pyplot.close", kept.append)
    draw_curves([curves], tmp_path / "x.png")
    left, right = kept[0].axes
    assert [line.get_marker() for line in left.lines] == ["o", "None"]
    assert all(float(tick).is_integer() for tick in left.get_xticks())
    assert right.get_ylim()[1] < 0.05
    assert [text.get_text() for text in right.texts] == ["0.031"]
    assert left.get_title() == "training loss"
