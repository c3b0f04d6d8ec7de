"""``accelerate``, its report and ``restore``: keys, parameters, copies and pickles, and everything undone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import segmenter_fast as sf
from support.checkpoints import GOLDEN
from support.mmseg_lookalike import MmEncoderDecoder, MmMultiheadAttention
from support.official_lookalike import OfficialAttention, OfficialSegmenter
from support.other_models import KINDS, MODELS, build, images, vit


@pytest.mark.parametrize(
    ("model", "folder", "file"),
    [(OfficialSegmenter(), "official_mask", "checkpoint.pth"), (MmEncoderDecoder(), "mmseg_mask", "segmenter.pth")],
    ids=["official", "mmseg"],
)
def test_original_programs_outputs(model: nn.Module, folder: str, file: str) -> None:
    """The look-alikes give the original programs' outputs, before and after ``accelerate``."""
    checkpoint = torch.load(GOLDEN / folder / file, weights_only=True)
    model.load_state_dict(checkpoint.get("model") or checkpoint["state_dict"], strict=True)
    cases = load_file(GOLDEN / folder / "cases.safetensors")
    sizes = {key.split("/")[1] for key in cases if key.startswith("forward/")}
    assert sizes
    model.eval()
    for accelerated in (False, True):
        if accelerated:
            sf.accelerate(model)
        for size in sizes:
            with torch.no_grad():
                logits = model(cases[f"forward/{size}/image"])
            assert (logits - cases[f"forward/{size}/logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_classes_of_instances_changes_and_that_is_undone(name: str) -> None:
    model, bystander = build(name), build(name)
    model.train()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    modules, classes = list(model.modules()), [type(module) for module in model.modules()]
    forwards = {cls: cls.forward for cls in classes}
    random_state = torch.get_rng_state()
    sf.accelerate(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())
    assert list(model.state_dict()) == keys
    assert all(value is parameters[key] for key, value in model.named_parameters())
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    changed = [(module, cls) for module, cls in zip(modules, classes, strict=True) if type(module) is not cls]
    report = sf.acceleration_report(model)
    assert len(changed) == len({item.name for item in report.replaced} | {*report.patch_sized})
    assert all(isinstance(module, cls) for module, cls in changed)
    assert all(cls.forward is forward for cls, forward in forwards.items())
    assert [type(module) for module in bystander.modules()] == classes

    assert sf.restore(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert "_acceleration_report" not in vars(model)
    assert [type(module) for module in sf.restore(bystander).modules()] == classes


def test_report() -> None:
    def replaced(name: str) -> set[tuple[str, str, str]]:
        report = sf.acceleration_report(sf.accelerate(MODELS[name]()))
        return {(item.name, item.cls.rsplit(".", 1)[1], item.op) for item in report.replaced}

    assert replaced("official") == {
        ("decoder", "OfficialMaskTransformer", "mask_scores"),
        ("encoder.blocks.0", "OfficialBlock", "attention"),
        ("encoder.blocks.1", "OfficialBlock", "attention"),
        ("decoder.blocks.0", "OfficialBlock", "attention"),
    }
    assert replaced("mmseg") == {
        ("backbone.layers.0.attn", "MmMultiheadAttention", "attention"),
        ("backbone.layers.1.attn", "MmMultiheadAttention", "attention"),
        ("decode_head.layers.0.attn", "MmMultiheadAttention", "attention"),
    }
    assert replaced("vit_tiny") == {(f"blocks.{layer}.attn", "Attention", "attention") for layer in range(2)}

    model = vit("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="not accelerated"):
        sf.acceleration_report(model)
    model.blocks[1].attn.q_norm = nn.LayerNorm(64)
    report = sf.acceleration_report(sf.accelerate(model))
    (left,) = report.left
    assert (left.name, left.cls) == ("blocks.1.attn", "timm.layers.attention.Attention")
    assert left.reason == "it has q_norm (LayerNorm), which the fused forward does not use"
    assert str(report) == (
        "replaced by kernels.attention: timm.layers.attention.Attention x 1 (blocks.0.attn)\n"
        f"left, {left.reason}: timm.layers.attention.Attention x 1 (blocks.1.attn)"
    )
    (head,) = sf.acceleration_report(sf.accelerate(MODELS["mmseg"]())).left
    assert head.name == "decode_head"


def setr() -> nn.Module:
    """mmsegmentation's ViT with the dropout of SETR's configurations."""
    model = MmEncoderDecoder()
    for module in model.modules():
        if isinstance(module, MmMultiheadAttention):
            module.proj_drop.p = 0.1
    return model


def test_report_of_dropout() -> None:
    """Dropout of attention keeps training on the original forward; that of the output does not, mmcv's neither."""
    for model, when in (
        (vit("vit_tiny_patch16_224", attn_drop_rate=0.1), "in evaluation"),
        (OfficialSegmenter(dropout=0.1).decoder.blocks, "in evaluation"),
        (MmEncoderDecoder(attn_drop=0.1), "in evaluation"),
        (setr(), ""),
        (vit("vit_tiny_patch16_224", proj_drop_rate=0.1), ""),
    ):
        report = sf.acceleration_report(sf.accelerate(model))
        assert {item.when for item in report.replaced} == {when}
        assert f"replaced by kernels.attention{' ' * bool(when)}{when}: " in str(report)


@pytest.mark.parametrize("name", KINDS)
def test_twice_is_once(name: str) -> None:
    model = sf.accelerate(MODELS[name]())
    classes, report = [type(module) for module in model.modules()], sf.acceleration_report(model)
    sf.accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    assert sf.acceleration_report(model) == report


def test_a_part_accelerated_before_is_in_the_report_of_the_whole() -> None:
    model = OfficialSegmenter()
    sf.accelerate(model.encoder)
    assert len(sf.acceleration_report(sf.accelerate(model)).replaced) == 4
    sf.restore(model)
    with pytest.raises(ValueError, match="not accelerated"):
        sf.acceleration_report(model.encoder)


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_pickles(name: str) -> None:
    model, x = build(name), images(name)
    expected = model(x)
    sf.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        pickle.loads(pickle.dumps(model, protocol=0)),
        torch.load(file, weights_only=False),
    ):
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert sf.acceleration_report(twin) == sf.acceleration_report(model)
        torch.testing.assert_close(twin(x), expected)
        sf.restore(twin)
        torch.testing.assert_close(twin(x), expected)
    assert len(sf.acceleration_report(model).replaced) > 1


def test_shared_modules_stay_shared() -> None:
    model, x = build("vit_tiny"), images("vit_tiny")
    model.blocks[1].attn = model.blocks[0].attn
    expected = model(x)
    torch.testing.assert_close(sf.accelerate(model)(x), expected)
    assert model.blocks[1].attn is model.blocks[0].attn
    assert [item.name for item in sf.acceleration_report(model).replaced] == ["blocks.0.attn"]


def test_meta_device() -> None:
    """A model on the meta device is accelerated, and gives right outputs once it has its weights."""
    source, x = build("vit_small"), images("vit_small")
    with torch.device("meta"):
        model = MODELS["vit_small"]().double().eval()
    assert len(sf.acceleration_report(sf.accelerate(model)).replaced) == 2
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(x.to("meta")).shape == (2, 5)
    model.load_state_dict(source.state_dict(), assign=True)
    torch.testing.assert_close(model(x), source(x))


def test_inference_mode_and_autocast_around_the_call() -> None:
    model, x = build("official", torch.float32), images("official", torch.float32)
    expected = model(x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        sf.accelerate(model)
    assert len(sf.acceleration_report(model).replaced) == 4
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        sf.accelerate("vit_tiny_patch16_224")  # type: ignore[type-var]
    with pytest.raises(TypeError, match="TorchScript"):
        sf.accelerate(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)))
    with pytest.warns(UserWarning, match="replaced nothing in Linear: it has no attention of a known kind"):
        sf.accelerate(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="runs on kernels.attention already"):
        sf.accelerate(sf.create_model("seg_t_mask_16", depth=1))


def test_restore_refuses_to_drop_a_class_made_since() -> None:
    model = sf.accelerate(MODELS["vit_tiny"]())
    attention = model.blocks[1].attn
    attention.__class__ = type("Sharded", (type(attention),), {})
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn is a Sharded"):
        sf.restore(model)
    assert type(model.blocks[0].attn).__name__ == "FusedAttention"


def test_an_official_attention_alone_keeps_its_map() -> None:
    with pytest.warns(UserWarning, match="returns more than a tensor"):
        attention = sf.accelerate(OfficialAttention(128, 2, 0.0))
    assert type(attention) is OfficialAttention
