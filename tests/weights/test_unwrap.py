"""Checkpoints of common trainers: containers, prefixes, averages, shards and folders of several processes."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast.train.presets import Recipe
from segmenter_fast.train.run_folder import open_run, save_checkpoint
from segmenter_fast.train.stepping import FORMAT_VERSION
from segmenter_fast.weights import distributed as reader
from segmenter_fast.weights.reading import CheckpointError
from segmenter_fast.weights.unwrap import find_state
from support.checkpoints import GOLDEN, same, small_model

MODEL = small_model()
STATE = MODEL.state_dict()
OTHER = {key: torch.zeros_like(tensor) for key, tensor in STATE.items()}


def prefixed(prefix: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


CHECKPOINTS: dict[str, Any] = {
    "ddp": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled, ddp": {"model": prefixed("module._orig_mod.")},
    "compiled encoder": {key.replace("encoder.", "encoder._orig_mod."): tensor for key, tensor in STATE.items()},
    "fsdp": {"model": {key.replace("s.0.", "s.0._fsdp_wrapped_module."): tensor for key, tensor in STATE.items()}},
    "lightning": {"state_dict": prefixed("model."), "epoch": 3, "callbacks": {}},
    "any name": {"state_dict": prefixed("net.segmenter.")},
    "model_state_dict": {"model_state_dict": STATE, "optimizer_state_dict": {"state": {0: OTHER}}},
    "deepspeed": {"module": STATE, "optimizer": None},
    "timm, average": {"state_dict": OTHER, "state_dict_ema": STATE, "epoch": 3},
    "average inside": {"model": OTHER, "ema": {"model": prefixed("module."), "updates": 3}},
    "teacher": {"student": prefixed("module.", OTHER), "teacher": prefixed("module.")},
    "teacher in the names": {"model": prefixed("student.", OTHER) | prefixed("teacher.")},
    "mmengine, average": {"state_dict": STATE, "ema_state_dict": prefixed("module.", OTHER)},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_of_common_trainers_load(name: str, tmp_path: Path) -> None:
    torch.save(CHECKPOINTS[name], tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="without a configuration") as caught:
        model = sf.load(tmp_path / "a.pth")
    assert len(caught) == 1
    assert same(model.state_dict(), STATE)


def test_a_prefix_beside_a_variant_keeps_the_configuration(tmp_path: Path) -> None:
    """ALGM, G2TM and others that train by the official program's files, with DDP's names."""
    content = torch.load(GOLDEN / "official_mask" / "checkpoint.pth", weights_only=True)
    content = {"model": prefixed("module.", content["model"]), "threshold": 0.88, "loss_scaler": {"scale": 1.0}}
    torch.save(content, tmp_path / "checkpoint.pth")
    (tmp_path / "variant.yml").write_bytes((GOLDEN / "official_mask" / "variant.yml").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sf.load(tmp_path)
    assert model.config == sf.load(GOLDEN / "official_mask").config
    assert same(model.state_dict(), sf.load(GOLDEN / "official_mask").state_dict())


def test_mmsegmentation_inside_of_a_wrapper(tmp_path: Path) -> None:
    content = torch.load(GOLDEN / "mmseg_mask" / "segmenter.pth", weights_only=True)
    wrapped = {**content, "state_dict": prefixed("model.", content["state_dict"])}
    torch.save(wrapped, tmp_path / "a.pth")
    assert same(sf.load(tmp_path / "a.pth").state_dict(), sf.load(GOLDEN / "mmseg_mask" / "segmenter.pth").state_dict())


@pytest.mark.parametrize("prefix", ["", "backbone.", "model.backbone.", "module.", "teacher.backbone."])
def test_an_encoder_with_a_prefix_starts_a_model(prefix: str, tmp_path: Path) -> None:
    encoder = {key.removeprefix("encoder."): tensor for key, tensor in STATE.items() if key.startswith("encoder.")}
    torch.save({"state_dict": prefixed(prefix, encoder) | {"head.weight": torch.ones(3, 2)}}, tmp_path / "a.pth")
    model = sf.create_model(MODEL.config, pretrained=tmp_path / "a.pth")
    assert same(model.encoder.state_dict(), encoder)


def test_tensors_beside_the_model_are_named() -> None:
    with pytest.warns(UserWarning, match=r"1 tensors beside the model's: \['criterion\.weight'\]"):
        model = sf.load(prefixed("model.") | {"criterion.weight": torch.ones(3)})
    assert same(model.state_dict(), STATE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": prefixed("module.") | {"module.step": 3}}, r"holds no state dict: its 'module\.step' is int"),
        (STATE | prefixed("_orig_mod.", OTHER), r"holds two tensors of the name encoder\.cls_token"),
        ({"model": pickle}, "holds no state dict: neither"),
    ],
)
def test_what_is_no_state_dict_is_named(content: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"here {reason}"):
        find_state(
            content | {"decoder.other": OTHER["decoder.cls_emb"].clone()} if "model" not in content else content, "here"
        )


def test_mappings_inside_of_each_other_take_no_time() -> None:
    layer: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(100):
        layer = {str(index): layer for index in range(100)}
    layer["self"] = layer
    with pytest.raises(CheckpointError, match="no state dict"):
        find_state(layer, "here")


def write_shards(folder: Path, edit: Callable[[dict[str, str]], None] = lambda _: None) -> Path:
    halves = [dict(list(STATE.items())[start::2]) for start in range(2)]
    places = {}
    for number, half in enumerate(halves):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(half, folder / name)
        places |= dict.fromkeys(half, name)
    edit(places)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_sharded_safetensors(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = write_shards(tmp_path)
    for source in (tmp_path, index):
        model = sf.load(source)
        assert (model.config, same(model.state_dict(), STATE)) == (MODEL.config, True)
    (tmp_path / "config.json").unlink()
    with pytest.warns(UserWarning, match="without a configuration"):
        assert same(sf.load(index).state_dict(), STATE)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("../other.safetensors", r"must name safetensors files beside it, got '\.\./other\.safetensors'"),
        ("model.safetensors.index.json", "must name safetensors files beside it"),  # itself
        (3, "must have a weight_map"),
        ("model-00001-of-00002.safetensors", r"its files lack \['more'\]"),
    ],
)
def test_an_index_that_is_wrong_is_named(place: Any, reason: str, tmp_path: Path) -> None:
    index = write_shards(tmp_path, lambda places: places.update(more=place))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json.*{reason}"):
        sf.load(index)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        sf.load(index)


@pytest.mark.parametrize("averaged", [True, False])
def test_a_checkpoint_of_a_training_run_has_its_configuration(averaged: bool, tmp_path: Path) -> None:
    config = MODEL.config.replace(mean=(0.1, 0.2, 0.3), class_names=("a", "b", "c"))
    open_run(tmp_path, Recipe(steps=1), sf.Segmenter(config), 3, resume=False)
    content = {"format_version": FORMAT_VERSION, "step": 7, "schedule": {}, "scaler": {}}
    content["optimizer"] = {"state": {key: {"momentum_buffer": OTHER[key]} for key in STATE}, "param_groups": []}
    content |= {"model": OTHER, "ema": {"model": STATE, "updates": 7}} if averaged else {"model": STATE, "ema": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sf.load(save_checkpoint(tmp_path, content))
    assert (model.config, same(model.state_dict(), STATE)) == (config, True)
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | {"model": {**run["model"], "depth": "2"}}))
    with pytest.raises(CheckpointError, match=r"run\.json: depth must be an integer, got '2'"):
        sf.load(tmp_path / "checkpoints" / "step-0000007.pt")


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    content = {
        "model": STATE,
        "optim": {"state": {key: {"exp_avg": OTHER[key]} for key in STATE}, "lr": 0.1},
        "step": 3,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


def test_a_folder_of_torch_distributed_checkpoint(distributed: Path) -> None:
    with pytest.warns(UserWarning, match="without a configuration") as caught:
        model = sf.load(distributed)
    assert len(caught) == 1
    assert same(model.state_dict(), STATE)


def test_its_metadata_executes_nothing(distributed: Path, tmp_path: Path) -> None:
    for path in distributed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    marker = tmp_path / "marker"
    for content in (b"cos\nsystem\n(Vtouch %s\ntR." % str(marker).encode(), b"", b"\x80\x04N.", b"garbage"):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata is damaged or of no known form"):
            sf.load(tmp_path)
    assert not marker.exists()


def test_a_damaged_or_missing_part_is_named(distributed: Path, tmp_path: Path) -> None:
    for path in distributed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = tmp_path / "__0_0.distcp"
    data.write_bytes(bytes(len(data.read_bytes())))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged"):
        sf.load(tmp_path)
    data.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged|claims"):
        sf.load(tmp_path)
    data.unlink()
    with pytest.raises((CheckpointError, FileNotFoundError), match=str(tmp_path)):
        sf.load(tmp_path)


def test_a_tensor_of_several_processes_is_put_together(tmp_path: Path) -> None:
    whole, places = torch.arange(15.0).view(5, 3), []
    for name, start, stop in (("__0_0.distcp", 0, 3), ("__1_0.distcp", 3, 5)):
        buffer = io.BytesIO()
        torch.save(whole[start:stop].clone(), buffer)
        (tmp_path / name).write_bytes(bytes(100) + buffer.getvalue() + bytes(10))
        place = {"relative_path": name, "offset": 100, "length": len(buffer.getvalue())}
        places.append(((start, 0), place))
    like = whole.to("meta")
    assert torch.equal(reader._read(tmp_path, like, places), whole)
    with pytest.raises(CheckpointError, match="has 9 of 15 values of a tensor: is a file missing"):
        reader._read(tmp_path, like, places[:1])
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp has a chunk \(2, 3\) at \(4, 0\) of \(5, 3\)"):
        reader._read(tmp_path, like, [((4, 0), places[1][1])])
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp has a chunk"):
        reader._read(tmp_path, like.double(), places[1:])
