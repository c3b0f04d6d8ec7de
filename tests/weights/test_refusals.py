"""Every entry refuses a bad file with its name and the reason, and executes nothing of it."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import segmenter_fast as sf
from segmenter_fast.cli import app
from segmenter_fast.weights.reading import CheckpointError, read_torch
from support.checkpoints import GOLDEN, Touches, official_folder, small_model

WHOLE = GOLDEN / "official_mask" / "checkpoint.pth"


def truncated(folder: Path) -> Path:
    path = official_folder(folder) / "checkpoint.pth"
    path.write_bytes(WHOLE.read_bytes()[:-1000])
    return path


def other_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "photos.pth", "w") as archive:
        archive.writestr("photo.txt", "sunset")
    return folder / "photos.pth"


def executing(folder: Path) -> Path:
    torch.save({**read_torch(WHOLE), "epoch": Touches(folder / "marker")}, folder / "evil.pth")
    return folder / "evil.pth"


def one_key_missing(folder: Path) -> Path:
    path = official_folder(folder) / "checkpoint.pth"
    content = read_torch(path)
    del content["model"]["encoder.blocks.1.attn.qkv.bias"]
    torch.save(content, path)
    return path


def wrong_heads(folder: Path) -> Path:
    small_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_heads": 3}))
    return folder / "model.safetensors"


BAD: list[tuple[Callable[[Path], Path], str, str]] = [
    (truncated, "checkpoint.pth", "damaged, truncated or no PyTorch checkpoint"),
    (other_zip, "photos.pth", "no PyTorch checkpoint|refused"),
    (executing, "evil.pth", "nothing in it was executed: .*system"),
    (one_key_missing, "checkpoint.pth", r"Missing key\(s\) in state_dict: \"encoder\.blocks\.1\.attn\.qkv\.bias\""),
    (wrong_heads, "config.json", "num_heads must be a divisor of embed_dim, which is 64, got 3"),
]


@pytest.mark.parametrize("entry", ["load", "create_model", "convert"])
@pytest.mark.parametrize(("make", "name", "reason"), BAD, ids=[case[0].__name__ for case in BAD])
def test_bad_files_are_refused_by_name(
    entry: str, make: Callable[[Path], Path], name: str, reason: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    if entry == "convert":
        result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out")])
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        message = result.stderr
    else:
        with pytest.raises(CheckpointError) as caught:
            sf.load(path) if entry == "load" else sf.create_model("seg_t_mask_16", pretrained=path)
        message = str(caught.value)
    assert name in message
    assert re.search(reason, message)
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "out").exists()
