"""config.json: what it holds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import segmenter_fast as sf
from segmenter_fast import VARIANTS
from segmenter_fast.weights.ours import FORMAT_VERSION, config_from_json, config_to_json
from segmenter_fast.weights.reading import CheckpointError
from support.checkpoints import SMALL, small_model


@pytest.mark.parametrize("config", [SMALL, *VARIANTS.values()], ids=lambda config: config.variant)
def test_a_configuration_survives_json(config: sf.SegmenterConfig) -> None:
    named = config.replace(
        class_names=tuple(f"class {index}" for index in range(config.num_classes)),
        palette=tuple((index % 256, 0, 255) for index in range(config.num_classes)),
    )
    for one in (config, named):
        assert config_from_json(json.loads(json.dumps(config_to_json(one)))) == one


def test_versions_are_written() -> None:
    content = config_to_json(SMALL)
    assert content["format_version"] == FORMAT_VERSION
    assert content["package_version"] == sf.__version__


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format_version": None}, "no configuration of segmenter-fast"),
        ({"format_version": "1"}, "no configuration of segmenter-fast"),
        ({"format_version": FORMAT_VERSION + 1}, f"format {FORMAT_VERSION + 1}, written by segmenter-fast 9.9"),
        ({"colour": 1}, r"unknown configuration field colour.*written by segmenter-fast 9\.9"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"depth": "12"}, "depth|not supported"),
        ({"num_heads": 3}, "num_heads must be a divisor"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "package_version": "9.9", **change}))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*({reason})"):
        sf.load(tmp_path)


def test_the_configuration_of_another_library_is_refused(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "segformer"}')
    with pytest.raises(CheckpointError, match="it has no format_version"):
        sf.load(tmp_path)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        sf.load(tmp_path)
