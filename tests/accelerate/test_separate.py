"""Attention of transformers and of timm's DINOv3: where it runs on the op, its results, and what is left."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import segmenter_fast as sf
from segmenter_fast.accelerate import match, separate
from segmenter_fast.accelerate.match import match_modules
from support.huggingface import build, transformers
from support.other_models import assert_left, outputs_and_gradients

NAMES = ["vit", "deit", "dinov2", "dinov2_registers", "dinov3", "dinov3_gated", "dpt", "beit"]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the op win on any machine, from any number of tokens on."""
    for module in (match, separate):
        monkeypatch.setattr(module, "runs_native", lambda dtype: True)
    monkeypatch.setattr(separate.FusedWhereFaster, "least", 1)


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


class First(nn.Module):
    """The first output of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return first(self.model(images))


def eva(**fields: Any) -> nn.Module:
    model = timm.create_model("vit_small_patch16_dinov3_qkvb", depth=2, **fields)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@pytest.mark.parametrize("name", [*NAMES, "eva"])
def test_the_outputs_are_the_original_ones(name: str, ops: list[str]) -> None:
    model = eva() if name == "eva" else build(name)
    for batch, size in ((1, (48, 48)), (2, (80, 64))):
        if size != (48, 48) and name in ("vit", "deit", "dpt", "beit"):
            continue  # they take one size
        images = torch.randn(batch, 3, *size)
        sf.restore(model)
        with torch.no_grad():
            expected = first(model(images))
            sf.accelerate(model)
            ops.clear()
            ours = first(model(images))
        assert len(ops) == len(sf.acceleration_report(model).replaced) >= 2
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [*NAMES, "eva"])
def test_gradients_are_the_original_ones(name: str, training: bool, ops: list[str]) -> None:
    model = First(eva() if name == "eva" else build(name)).train(training)
    images = torch.randn(2, 3, 48, 48)
    expected = outputs_and_gradients(model, images)
    sf.accelerate(model)
    ops.clear()
    ours = outputs_and_gradients(model, images)
    assert len(ops) >= 2
    assert ours.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values() if value.numel())
    for key in (key for key in ours if ours[key].numel()):  # the bias of keys has none but noise
        scale = expected[key].abs().max().clamp(min=largest / 100)
        assert (ours[key] - expected[key]).abs().max() <= 1e-5 * scale, key


@pytest.mark.parametrize("name", ["dinov2", "eva"])
def test_gradients_of_gradients_are_the_original_ones(name: str) -> None:
    model, images = First(eva() if name == "eva" else build(name)), torch.randn(1, 3, 48, 48, requires_grad=True)

    def penalty() -> Tensor:
        (grad,) = torch.autograd.grad(model(images).square().mean(), images, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), images)[0]

    with sdpa_kernel(SDPBackend.MATH):  # the original's flash kernel has none
        expected = penalty()
    sf.accelerate(model)
    assert (penalty() - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["vit", "eva"])
def test_dropout_of_attention_takes_the_original_path_in_training(name: str, ops: list[str]) -> None:
    model = eva(attn_drop_rate=0.1) if name == "eva" else build(name, attention_probs_dropout_prob=0.1)
    (when,) = {item.when for item in sf.acceleration_report(sf.accelerate(model)).replaced}
    assert when == "on a CPU, from 1 tokens (half with gradients, half in bfloat16), in evaluation"
    ops.clear()
    model.train()(torch.randn(1, 3, 48, 48))
    assert not ops
    model.eval()(torch.randn(1, 3, 48, 48))
    assert len(ops) == 2


def test_masks_maps_dropout_and_other_implementations_take_the_original_path(ops: list[str]) -> None:
    model, images = build("dinov2", attention_probs_dropout_prob=0.2), torch.randn(1, 3, 48, 48)
    layer, tokens = model.encoder.layer[0].attention, torch.randn(1, 9, 64)
    mask = torch.zeros(1, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e9)
    with torch.no_grad():
        masked = layer(tokens, attention_mask=mask)[0]
        sf.accelerate(model)
        ops.clear()
        assert torch.equal(layer(tokens, attention_mask=mask)[0], masked)
        layer.train()(tokens)
        assert not ops
        layer.eval()(hidden_states=tokens, output_hidden_states=True)
        assert ops == ["attention"]
        model.set_attn_implementation("eager")
        ops.clear()
        maps = model(images, output_attentions=True).attentions
        assert not ops
    assert len(maps) == 2
    assert all(part.shape == (1, 2, 37, 37) for part in maps)


def test_autocast_keeps_the_dtype() -> None:
    model, images = build("dinov3"), torch.randn(1, 3, 48, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = first(model(images))
        ours = first(sf.accelerate(model)(images))
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours.float(), expected.float(), rtol=0.05, atol=0.1)


def test_nothing_else_changes(ops: list[str]) -> None:
    """Another model of the same configuration keeps its attention; copies and pickles keep the fused one."""
    model = build("vit")
    bystander = type(model)(model.config).eval()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    classes = [type(module) for module in model.modules()]
    sf.accelerate(model)
    assert list(model.state_dict()) == keys
    assert all(value is parameters[key] for key, value in model.named_parameters())
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        ops.clear()
        bystander(images)
        assert not ops
        expected = first(model(images))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(first(twin(images)), expected)
    assert len(ops) == 6
    sf.restore(model)
    assert [type(module) for module in model.modules()] == classes


def test_it_runs_only_where_it_was_measured_to_win(monkeypatch: pytest.MonkeyPatch, ops: list[str]) -> None:
    model, images = build("vit"), torch.randn(1, 3, 48, 48)
    sf.accelerate(model)
    monkeypatch.setattr(separate.FusedWhereFaster, "least", 38)
    for calls in ([], ["attention"] * 2):
        ops.clear()
        with torch.set_grad_enabled(bool(calls)):
            model(images)  # 37 tokens
        assert ops == calls
    report = str(sf.acceleration_report(sf.accelerate(sf.restore(model))))
    assert report.startswith(
        "replaced by kernels.attention on a CPU, from 38 tokens (half with gradients, half in bfloat16): transf"
    )
    monkeypatch.setattr(match, "runs_native", lambda dtype: False)
    assert_left(sf.restore(model).layers[0].attention, "no C++ kernel runs here, and PyTorch's attention is as fast")


def hf(name: str, **fields: Any) -> nn.Module:
    model = build(name, **fields)
    return next(module for module in model.modules() if type(module).__name__.endswith("Attention"))


def with_unequal_heads() -> nn.Module:
    module: Any = hf("vit")
    module.k_proj = nn.Linear(64, 32)
    return module


def causal() -> nn.Module:
    module: Any = hf("vit")
    module.is_causal = True
    return module


LEFT: dict[str, tuple[Any, str]] = {
    "eager": (lambda: hf("vit", attn_implementation="eager"), "it returns attention maps"),
    "bias": (lambda: hf("beit", use_relative_position_bias=True), "its scores have position biases (use_relative"),
    "causal": (causal, "its outputs or gradients are not those of plain attention"),
    "heads": (lambda: hf("vit", num_attention_heads=4, hidden_size=96), "head size 24 is none of"),
    "keys": (with_unequal_heads, "q, k and v make 64, 32, 64 features"),
    "reduced": (
        lambda: transformers.SegformerModel(transformers.SegformerConfig()).stages[0].blocks[0].attention,
        "it has sequence_reduction",
    ),
    "neighbours": (lambda: timm.layers.AttentionRope(64, 2), "it turns pairs of neighbouring channels"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left(case: str) -> None:
    module, reason = LEFT[case]
    assert_left(module(), reason)


def test_eomt_is_taken() -> None:
    """Its attention alone: the model needs scipy."""
    config = transformers.EomtConfig(hidden_size=64, num_attention_heads=2, attn_implementation="sdpa")
    plain = transformers.models.eomt.modeling_eomt.EomtAttention(config)
    config = transformers.EomtDinov3Config(hidden_size=64, num_attention_heads=2, attn_implementation="sdpa")
    rotary = transformers.models.eomt_dinov3.modeling_eomt_dinov3.EomtDinov3Attention(config)
    found = [match for _, _, match in match_modules(nn.ModuleList([plain, rotary]))]
    assert found == [separate.FusedSeparateAttention] * 2


@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_compiles_without_a_graph_break(name: str) -> None:
    model, images = sf.accelerate(First(build(name))), torch.randn(1, 3, 48, 48)
    for training in (False, True):
        model.train(training)
        with torch.set_grad_enabled(training):
            expected, ours = (
                torch.manual_seed(0) and run(images)  # DINOv3 moves its positions
                for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True))
            )
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_separate_projections_of_another_library_are_named() -> None:
    class OtherAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))

    assert_left(OtherAttention(), "it has separate q, k and v")


def test_layers_of_one_configuration_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[nn.Module] = []
    find = match.find_difference
    monkeypatch.setattr(match, "find_difference", lambda part, *rest: trials.append(part) or find(part, *rest))
    model = build("dinov3", num_hidden_layers=4)
    assert len([name for name, _, found in match_modules(model) if found is separate.FusedSeparateAttention]) == 4
    assert len(trials) == 1
