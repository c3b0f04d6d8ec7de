"""``segmenter-fast info``, ``variants``, ``convert`` and ``push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.hub_mixin
import pytest

import segmenter_fast as sf
from segmenter_fast.config import PUBLISHED_MIOU
from segmenter_fast.weights.reading import read_torch
from support.checkpoints import GOLDEN, RecordingHub, official_folder, same, small_model
from support.predict import call


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


def test_official_to_ours_and_back(tmp_path: Path) -> None:
    official = GOLDEN / "official_deit_linear"
    result = call("convert", official, tmp_path / "ours")
    assert result.exit_code == 0, result.output
    assert f"written: {tmp_path / 'ours'}" in result.output
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert call("convert", tmp_path / "ours", tmp_path / "back", "--to", "official").exit_code == 0
    before, after = (read_torch(folder / "checkpoint.pth")["model"] for folder in (official, tmp_path / "back"))
    assert same(before, after)


def test_changed_numerics_are_reported(tmp_path: Path) -> None:
    result = call("convert", GOLDEN / "mmseg_mask" / "segmenter.pth", tmp_path / "out", "--to", "official")
    assert result.exit_code == 0, result.output
    assert "warning: the official program runs it with encoder_norm_eps 1e-05, not 1e-06" in result.stderr


@pytest.mark.parametrize("to", ["ours", "official"])
def test_a_folder_with_the_other_format_is_left_alone(to: str, tmp_path: Path) -> None:
    other = official_folder(tmp_path / "out")
    if to == "official":
        other = tmp_path / "ours"
        small_model().save_pretrained(other)
    files = {path: path.read_bytes() for path in other.iterdir()}
    result = call("convert", GOLDEN / "official_mask", other, "--to", to)
    assert result.exit_code == 2
    assert "holds another checkpoint" in result.stderr
    assert {path: path.read_bytes() for path in other.iterdir()} == files


def test_refusals_are_one_line_and_write_nothing(tmp_path: Path) -> None:
    registers = small_model(num_register_tokens=2)
    registers.save_pretrained(tmp_path / "registers")
    for arguments, reason in {
        (tmp_path / "registers", "--to", "official"): "cannot run custom: it has no num_register_tokens=2",
        (tmp_path / "absent",): f"{tmp_path / 'absent'}: no such file",
        ("seg_t_mask_16",): "seg_t_mask_16: no such file",
    }.items():
        result = call("convert", arguments[0], tmp_path / "out", *arguments[1:])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert reason in result.stderr
        assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_or_the_checkpoint_itself_is_refused(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "c1")
    (tmp_path / "file").write_text("mine")
    before = (tmp_path / "c1/model.safetensors").read_bytes()
    for source in (tmp_path / "c1", tmp_path / "c1/model.safetensors"):
        assert f"{tmp_path / 'c1'} is the checkpoint that is read" in call("convert", source, tmp_path / "c1").stderr
    result = call("convert", tmp_path / "c1", tmp_path / "file")
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: {tmp_path / 'file'} is a file; OUT is the folder to write\n",
    )
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "c1/model.safetensors").read_bytes() == before


def test_push_uploads_the_model_with_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = RecordingHub(tmp_path)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", hub)
    result = call("push", GOLDEN / "official_mask", "org/name", "--private", "--license", "mit")
    assert result.exit_code == 0, result.output
    assert "https://hub/commit" in result.output
    assert hub.private == {"org/name": True}
    uploaded = tmp_path / "org" / "name"
    assert {path.name for path in uploaded.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card = (uploaded / "README.md").read_text()
    for wanted in ("license: mit", "| licence of the weights | mit |", "| numerics of | the official program |"):
        assert wanted in card


def test_push_names_the_reason_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route to host\nand more")

    hub = RecordingHub(tmp_path)
    monkeypatch.setattr(hub, "create_repo", unreachable)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", hub)
    result = call("push", GOLDEN / "official_mask", "org/name")
    assert result.exit_code == 2
    assert "error: org/name cannot be pushed to the Hugging Face Hub: no route to host" in result.stderr
    assert "Traceback" not in result.output
    assert "repository must be org/name, got 'name'" in call("push", GOLDEN / "official_mask", "name").stderr
    assert "no such file" in call("push", "seg_t_mask_16", "org/name").stderr  # a variant's name: random weights
