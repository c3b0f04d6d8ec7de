"""``load`` recognises every source by its content and refuses the rest by name."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import segmenter_fast as sf
from segmenter_fast.cli import app
from segmenter_fast.weights.reading import CheckpointError, read_torch
from support.checkpoints import GOLDEN, Touches, official_folder, same, small_model

OFFICIAL = GOLDEN / "official_mask"


@pytest.mark.parametrize("source", [OFFICIAL, str(OFFICIAL), OFFICIAL / "checkpoint.pth", str(OFFICIAL) + os.sep])
def test_official_folder_and_file(source: str | Path) -> None:
    model = sf.load(source)
    assert same(model.state_dict(), read_torch(OFFICIAL / "checkpoint.pth")["model"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_any_name_beside_a_variant_and_a_bare_state_dict_with_one(tmp_path: Path) -> None:
    official_folder(tmp_path)
    torch.save(read_torch(OFFICIAL / "checkpoint.pth")["model"], tmp_path / "best.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sf.load(tmp_path / "best.pt")
    assert model.config == sf.load(OFFICIAL).config


@pytest.mark.parametrize("kind", ["mapping", "pth", "checkpoint", "safetensors"])
@pytest.mark.parametrize("name", ["official_mask", "official_deit_linear"])
def test_a_bare_official_state_dict_says_what_it_assumes(kind: str, name: str, tmp_path: Path) -> None:
    content = read_torch(GOLDEN / name / "checkpoint.pth")
    source: object = content["model"]
    if kind == "pth":
        torch.save(content["model"], source := tmp_path / "a.pth")
    elif kind == "checkpoint":
        torch.save(content, source := tmp_path / "a.pth")
    elif kind == "safetensors":
        save_file(content["model"], source := tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"without a configuration: heads of 64, mean \(0\.\d+, "):
        model = sf.load(source)  # type: ignore[arg-type]
    whole = sf.load(GOLDEN / name)
    assert same(model.state_dict(), whole.state_dict())
    assert (model.config.mean, model.config.head_classes) == (whole.config.mean, whole.config.head_classes)


@pytest.mark.parametrize("kind", ["mapping", "pth", "safetensors"])
def test_a_bare_mmsegmentation_state_dict(kind: str, tmp_path: Path) -> None:
    file = GOLDEN / "mmseg_mask" / "segmenter.pth"
    source: object = read_torch(file)["state_dict"]
    if kind == "pth":
        torch.save(source, tmp_path / "a.pth")
    elif kind == "safetensors":
        save_file(source, tmp_path / "a.safetensors")
    model = sf.load(source if kind == "mapping" else tmp_path / f"a.{kind}")  # type: ignore[arg-type]
    whole = sf.load(file)
    assert same(model.state_dict(), whole.state_dict())
    assert model.config == whole.config.replace(class_names=(), palette=())


def test_our_folder_and_either_of_its_files(tmp_path: Path) -> None:
    model = small_model(class_names=("a", "b", "c"))
    model.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert same(sf.load(source).state_dict(), model.state_dict())
        assert sf.load(source).config == model.config


def test_official_to_ours_and_back_is_bit_for_bit(tmp_path: Path) -> None:
    for name in ("official_mask", "official_deit_linear"):
        original = read_torch(GOLDEN / name / "checkpoint.pth")["model"]
        sf.load(GOLDEN / name).save_pretrained(tmp_path / name)
        again = sf.load(tmp_path / name)
        assert same(again.state_dict(), original)
        assert again.config == sf.load(GOLDEN / name).config


def test_fields_and_class_count_reach_the_model() -> None:
    with pytest.warns(UserWarning, match=r"official_mask.*has 7 classes, not 3: decoder\.cls_emb"):
        model = sf.load(OFFICIAL, num_classes=3, image_size=96, window_stride=10)
    assert (model.config.num_classes, model.config.image_size, model.config.window_stride) == (3, (96, 96), 10)
    assert model.encoder.pos_embed.shape == (1, 37, 128)
    with pytest.raises(TypeError, match="unknown configuration field"):
        sf.load(OFFICIAL, colour="red")


def test_warnings_point_at_the_caller() -> None:
    with pytest.warns(UserWarning, match="7 classes") as caught:
        sf.load(OFFICIAL, num_classes=3)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="without a configuration") as caught:
        sf.load(read_torch(OFFICIAL / "checkpoint.pth")["model"])
    assert caught[0].filename == __file__


@pytest.mark.parametrize("variant", ["seg_s_dinov2_mask_14", "seg_s_dinov3_linear_16"])
def test_models_on_dino_backbones_survive_saving_and_the_loss_of_their_configuration(
    variant: str, tmp_path: Path
) -> None:
    model = sf.create_model(variant, num_classes=4, image_size=112).eval()
    model.save_pretrained(tmp_path)
    whole = sf.load(tmp_path)
    assert whole.config == model.config
    (tmp_path / "config.json").unlink()
    with pytest.warns(UserWarning, match="without a configuration"):
        bare = sf.load((tmp_path / "model.safetensors").rename(tmp_path / "bare.safetensors"), image_size=112)
    assert bare.config.replace(window_size=518, window_stride=518) == whole.config.replace(
        window_size=518, window_stride=518
    )
    images = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        assert torch.equal(bare(images), model(images))
        assert torch.equal(whole(images), model(images))


def test_a_position_embedding_that_is_missing_is_no_rotary_one() -> None:
    state = read_torch(OFFICIAL / "checkpoint.pth")["model"]
    del state["encoder.pos_embed"]
    with pytest.raises(CheckpointError, match=r"the state dict: encoder\.pos_embed is missing"):
        sf.load(state)


def test_a_name_like_a_variant_and_a_source_of_another_kind() -> None:
    with pytest.raises(FileNotFoundError, match=r"seg_t_msk_16: no such file .*; did you mean seg_t_mask_16\?$"):
        sf.load("seg_t_msk_16")
    with pytest.raises(FileNotFoundError, match=r"create_model makes a variant, without trained weights$"):
        sf.load("seg_t_mask_16")
    with pytest.raises(TypeError, match="source must be a path, a hub id or a state dict, got int"):
        sf.load(5)  # type: ignore[arg-type]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        sf.load(tmp_path / "absent")
    for name in ("checkpoint.pth", "variant.yml"):
        folder = official_folder(tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            sf.load(folder)
    for name in ("config.json", "model.safetensors"):
        small_model().save_pretrained(tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            sf.load(tmp_path / name)


@pytest.mark.parametrize("missing", ["variant.yml", "checkpoint.pth", "config.json", "model.safetensors"])
def test_a_missing_part_of_a_folder_is_named(missing: str, tmp_path: Path) -> None:
    if missing in ("config.json", "model.safetensors"):
        small_model().save_pretrained(tmp_path)
    else:
        official_folder(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing}: no such file"):
        sf.load(tmp_path)


def test_an_empty_folder_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: expected config\.json and model\.safetensors, or"):
        sf.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "no state dict"),
        ({"epoch": 3}, "no state dict"),
        ({"model": {}}, "no state dict"),
        ({"model": {"conv1.weight": torch.ones(2)}}, r"no Segmenter: its keys are conv1\.weight"),
        ({1: torch.ones(2)}, "no state dict: its 1 is Tensor"),
        ({"encoder.a": torch.ones(2), "b": 3}, "no state dict: its 'b' is int"),
        ({"encoder.a": torch.ones(2), "b": [1.0]}, "no state dict: its 'b' is list"),
        ({"encoder.a": torch.ones(2), "b": None}, "no state dict: its 'b' is NoneType"),
        ({"encoder.norm.weight": torch.ones(2)}, r"encoder\.patch_embed\.proj\.weight is missing"),
        ({"backbone.a": torch.ones(2), "decode_head.b": torch.ones(2)}, r"patch_embed\.proj\.weight is missing"),
    ],
)
def test_other_content_is_refused_by_name(content: object, reason: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=rf"other\.pth.*{reason}"):
        sf.load(tmp_path / "other.pth")


def truncated(folder: Path) -> Path:
    path = official_folder(folder) / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def other_zip(folder: Path) -> Path:
    path = official_folder(folder) / "checkpoint.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.txt", "sunset")
    return path


def executing(folder: Path) -> Path:
    path = official_folder(folder) / "checkpoint.pth"
    torch.save({**read_torch(path), "optimizer": Touches(folder / "marker")}, path)
    return path


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


def picture(folder: Path) -> Path:
    path = official_folder(folder) / "checkpoint.pth"
    Image.new("RGB", (8, 8)).save(path, "JPEG")
    return path


@pytest.mark.parametrize("entry", ["load file", "load folder", "create_model", "convert"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (truncated, r"checkpoint\.pth is damaged, truncated or no PyTorch checkpoint"),
        (picture, r"checkpoint\.pth is damaged, truncated or no PyTorch checkpoint$"),
        (other_zip, r"checkpoint\.pth is (refused|damaged)"),
        (executing, r"checkpoint\.pth is refused, and nothing in it was executed: .*system"),
        (one_key_missing, r"checkpoint\.pth does not fit.*\n\tMissing key.*: .encoder\.blocks\.1\.attn\.qkv\.bias.\."),
        (wrong_heads, r"config\.json: num_heads must be a divisor of embed_dim, which is 64, got 3"),
    ],
)
def test_bad_files_are_refused_by_name(entry: str, make: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    if entry == "convert":
        result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out")])
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        message = result.stderr
    else:
        call = functools.partial(sf.create_model, "seg_t_mask_16") if entry == "create_model" else sf.load
        with pytest.raises(CheckpointError) as caught:
            call(path.parent if entry == "load folder" else path)
        message = str(caught.value)
    assert re.search(reason, message)
    assert not (tmp_path / "model" / "marker").exists()
    assert not (tmp_path / "out").exists()


def test_a_hub_id_without_network_is_refused_clearly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match="nobody/nothing is no file or folder, nor does the Hugging Face Hub give nobody"
    ):
        sf.load("nobody/nothing")


def test_a_hub_id_in_the_cache_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = small_model()
    commit, repository = "0" * 40, tmp_path / "models--org--name"
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert same(sf.load("org/name").state_dict(), model.state_dict())
    with pytest.warns(UserWarning, match="org/name has 3 classes, not 2"):
        assert sf.load("org/name", num_classes=2).config.num_classes == 2
    shutil.rmtree(repository)


def test_an_existing_path_of_the_form_of_an_id_is_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert same(sf.load("org/name").state_dict(), model.state_dict())
