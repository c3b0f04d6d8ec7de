"""Our own format: its files, and huggingface_hub's mixin without network."""

from __future__ import annotations

import copy
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import huggingface_hub.hub_mixin
import pytest
import torch
from safetensors.torch import load_file

import segmenter_fast as sf
from segmenter_fast import VARIANTS
from segmenter_fast.weights import hub
from segmenter_fast.weights.reading import CheckpointError
from support.checkpoints import GOLDEN, SMALL, RecordingHub, same, small_model

FILES = {"README.md", "config.json", "model.safetensors"}


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    model = sf.load(GOLDEN / "mmseg_mask" / "segmenter.pth")
    model.save_pretrained(tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == FILES
    again = sf.Segmenter.from_pretrained(tmp_path / "new" / "folder")
    assert same(again.state_dict(), model.state_dict())
    assert again.config == model.config
    assert again.config.class_names[0] == "thing 0"
    assert not again.training
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 80)
        assert torch.equal(again(images), model(images))


def test_a_low_precision_model_is_saved_as_it_is(tmp_path: Path) -> None:
    small_model().bfloat16().save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert next(sf.load(tmp_path).parameters()).dtype == torch.float32


def test_from_pretrained_takes_configuration_fields(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has 3 classes, not 5"):
        model = sf.Segmenter.from_pretrained(tmp_path, num_classes=5, image_size=48)
    assert (model.config.num_classes, model.config.image_size) == (5, (48, 48))
    with pytest.raises(TypeError, match="unknown configuration field"):
        sf.Segmenter.from_pretrained(tmp_path, colour="red")


def test_from_pretrained_lists_keys_that_do_not_fit(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "encoder.norm.bias"}
    hub.write_folder(tmp_path, model.config, state)
    with pytest.raises(CheckpointError, match=r"Missing key\(s\) in state_dict: \"encoder\.norm\.bias\"\."):
        sf.Segmenter.from_pretrained(tmp_path)


def test_from_pretrained_of_an_empty_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        sf.Segmenter.from_pretrained(tmp_path)


def test_a_second_save_replaces_the_first_and_keeps_other_files(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    model = small_model(num_classes=5)
    model.save_pretrained(tmp_path)
    assert same(sf.load(tmp_path).state_dict(), model.state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "notes.txt"}
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs limits on file sizes (Unix)")
    before = small_model()
    before.save_pretrained(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors cannot be written"):
            small_model(num_classes=5).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert same(sf.load(tmp_path).state_dict(), before.state_dict())


def test_an_interrupted_save_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = small_model()
    before.save_pretrained(tmp_path)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)  # of config.json, after the weights
    with pytest.raises(KeyboardInterrupt):
        small_model(num_classes=5).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert same(sf.load(tmp_path).state_dict(), before.state_dict())


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        small_model().save_pretrained(tmp_path / "file")


def test_the_model_card_describes_the_model(tmp_path: Path) -> None:
    model = small_model(class_names=("sky", "tree", "road"))
    model.save_pretrained(tmp_path, model_card_kwargs={"license": "mit"})
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n")
    for wanted in ("license: mit", "library_name: segmenter-fast", "3: sky, tree, road", "bilinear", "1e-05"):
        assert wanted in card


@pytest.mark.parametrize(
    ("backbone", "licence"),
    [
        (None, "not stated |"),
        (
            "vit_small_patch16_dinov3.lvd1689m",
            "not stated; if they started from vit_small_patch16_dinov3.lvd1689m: that",
        ),
        ("vit_small_patch16_dinov3.lvd1689m", "is under the DINOv3 License |"),
        ("deit_base_distilled_patch16_384.fb_in1k", "is under Apache 2.0 |"),
    ],
)
def test_the_model_card_does_not_make_up_a_licence(backbone: str | None, licence: str) -> None:
    card = str(small_model(timm_backbone=backbone).generate_model_card())
    assert licence in card
    assert "license:" not in card


@pytest.mark.parametrize(
    ("fields", "program"),
    [
        ({}, "the official program"),
        ({"encoder_norm_eps": 1e-6, "pos_embed_mode": "bicubic", "upsample_to": "image"}, "mmsegmentation"),
        ({"pos_embed_kind": "rotary"}, "timm in the encoder"),
        ({"decoder_norm_eps": 1e-3}, "no program we know"),
    ],
)
def test_the_model_card_names_the_numerics(fields: dict[str, Any], program: str) -> None:
    card = str(small_model(**fields).generate_model_card())
    assert f"| numerics of | {program}" in card
    assert ("| position embedding | rotary |" in card) == ("pos_embed_kind" in fields)


@pytest.mark.parametrize("through_save", [False, True])
def test_push_uploads_what_load_reads(through_save: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", RecordingHub(tmp_path / "hub"))
    if through_save:
        assert model.save_pretrained(tmp_path / "name", push_to_hub=True) == "https://hub/commit"
        assert same(sf.load(tmp_path / "hub" / "name").state_dict(), model.state_dict())
    else:
        assert model.push_to_hub("org/name") == "https://hub/commit"
        assert same(sf.load(tmp_path / "hub" / "org" / "name").state_dict(), model.state_dict())


def test_the_mixin_leaves_copying_and_pickling_alone() -> None:
    model = small_model()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(again.state_dict(), model.state_dict())
        assert again.config == model.config


def test_config_json_is_readable_by_others(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["num_classes"], content["image_size"], content["decoder"]) == (3, [32, 32], "mask")
    assert content["format_version"] == hub.FORMAT_VERSION
    assert content["package_version"] == sf.__version__


@pytest.mark.parametrize("config", [SMALL, *VARIANTS.values()], ids=lambda config: config.variant)
def test_a_configuration_survives_saving(config: sf.SegmenterConfig, tmp_path: Path) -> None:
    named = config.replace(
        class_names=tuple(f"class {index}" for index in range(config.num_classes)),
        palette=tuple((index % 256, 0, 255) for index in range(config.num_classes)),
    )
    for one in (config, named):
        hub.write_folder(tmp_path, one, {})
        assert hub.read_folder(tmp_path).config == one


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format_version": None}, "no configuration of segmenter-fast"),
        ({"format_version": "1"}, "no configuration of segmenter-fast"),
        ({"format_version": hub.FORMAT_VERSION + 1}, f"format {hub.FORMAT_VERSION + 1}, written by segmenter-fast 9.9"),
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
    with pytest.raises(CheckpointError, match="model_type 'segformer' is none of vit, deit"):
        sf.load(tmp_path)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        sf.load(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_permissions_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        small_model().save_pretrained(tmp_path / "m")
    finally:
        os.umask(before)
    for name in ("config.json", "model.safetensors", "README.md"):
        assert stat.S_IMODE((tmp_path / "m" / name).stat().st_mode) == 0o666 & ~umask, name


@pytest.mark.parametrize("path", ["run/best", "run/last", "models/official.pth"])
def test_a_path_that_is_not_there_is_not_sought_on_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "read_hub", None)
    with pytest.raises(FileNotFoundError, match=f"^{path}: no such file or folder"):
        sf.load(path)
