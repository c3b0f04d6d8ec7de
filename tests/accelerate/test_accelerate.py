"""Other libraries' models on the fused ops: same outputs, gradients, keys and parameters, and all of it undone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import segmenter_fast as sf
from segmenter_fast import kernels
from support.accuracy import assert_as_accurate
from support.checkpoints import GOLDEN
from support.mmseg_lookalike import MmEncoderDecoder
from support.official_lookalike import OfficialAttention, OfficialBlock, OfficialSegmenter


def vit(name: str, **fields: object) -> nn.Module:
    size = 56 if "patch14" in name else 64
    return timm.create_model(name, **{"depth": 2, "img_size": size, "num_classes": 5, **fields})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "official": lambda: OfficialSegmenter(dropout=0.0),
    "mmseg": lambda: MmEncoderDecoder(drop_path=0.1),
    "mmseg_tokens_first": lambda: MmEncoderDecoder(batch_first=False),
    "vit_tiny": lambda: vit("vit_tiny_patch16_224"),
    "vit_small": lambda: vit("vit_small_patch16_224", drop_path_rate=0.2, proj_drop_rate=0.1),
    "vit_base": lambda: vit("vit_base_patch16_224", qkv_bias=False),
    "deit": lambda: vit("deit_tiny_distilled_patch16_224"),
    "dinov2_registers": lambda: vit("vit_small_patch14_reg4_dinov2"),
}
# One of each kind of swapped module.
KINDS = ("official", "mmseg", "vit_tiny")


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose attention is far from uniform."""
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def images(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, *{"official": (50, 71), "dinov2_registers": (56, 56)}.get(name, (64, 64)), dtype=dtype)


def outputs_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """In the model's mode, with one seed for its dropout."""
    torch.manual_seed(1)
    x = x.detach().clone().requires_grad_()
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"out": out.detach(), "images": x.grad, **grads}


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops in the order in which they were called."""
    called: list[str] = []

    def counted(name: str) -> Callable[..., Tensor]:
        op = getattr(kernels, name)
        return lambda *args: called.append(name) or op(*args)

    for name in ("attention", "mask_scores"):
        monkeypatch.setattr(kernels, name, counted(name))
    return called


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_in_float64(name: str, training: bool, ops: list[str]) -> None:
    model, x = build(name).train(training), images(name)
    expected = outputs_and_gradients(model, x)
    assert sf.accelerate(model) is model
    assert model.training == training
    ops.clear()
    ours = outputs_and_gradients(model, x)
    assert ops == ["attention"] * (2 if "vit" in name or name in ("deit", "dinov2_registers") else 3) + (
        ["mask_scores"] if name == "official" else []
    )
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_low_precision_is_as_accurate_as_before(name: str, dtype: torch.dtype) -> None:
    model, x = build(name, dtype), images(name, dtype)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    peer = outputs_and_gradients(model, x)
    ours = outputs_and_gradients(sf.accelerate(model), x)
    for key in ("out", "images"):
        assert ours[key].dtype == dtype
        assert_as_accurate(ours[key], peer[key], oracle[key])


@pytest.mark.parametrize("name", KINDS)
def test_autocast_keeps_the_dtype_and_the_accuracy(name: str) -> None:
    model, x = build(name, torch.float32), images(name, torch.float32)
    oracle = copy.deepcopy(model).double()(x.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        peer = model(x)
        ours = sf.accelerate(model)(x)
    assert ours.dtype == peer.dtype
    assert_as_accurate(ours.float(), peer.float(), oracle, ulps=4 * 2**16)  # of bfloat16


@pytest.mark.parametrize(
    ("model", "folder", "file"),
    [(OfficialSegmenter(), "official_mask", "checkpoint.pth"), (MmEncoderDecoder(), "mmseg_mask", "segmenter.pth")],
    ids=["official", "mmseg"],
)
def test_original_programs_outputs(model: nn.Module, folder: str, file: str) -> None:
    """The look-alikes are what they look like, and stay it when they are accelerated."""
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
    assert len(changed) == len(sf.acceleration_report(model).replaced)
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


@pytest.mark.parametrize("name", KINDS)
def test_compiles_without_a_graph_break(name: str) -> None:
    model, x = build(name, torch.float32), images(name, torch.float32)
    expected = outputs_and_gradients(sf.accelerate(model), x)
    ours = outputs_and_gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    torch.testing.assert_close(ours["out"], expected["out"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["images"], expected["images"], rtol=1e-3, atol=1e-3)


def test_meta_device() -> None:
    """A model without memory is accelerated by its structure, and right once it has its weights."""
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


@pytest.mark.parametrize("name", ["official", "mmseg", "vit_tiny"])
def test_attention_dropout_takes_the_original_path_in_training(name: str, ops: list[str]) -> None:
    model = {
        "official": lambda: OfficialSegmenter(dropout=0.1),
        "mmseg": lambda: MmEncoderDecoder(attn_drop=0.1),
        "vit_tiny": lambda: vit("vit_tiny_patch16_224", attn_drop_rate=0.1),
    }[name]()
    model, x = model.double().train(), images(name)
    expected = outputs_and_gradients(model, x)
    sf.accelerate(model)
    ops.clear()
    ours = outputs_and_gradients(model, x)
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, msg=key)
    # The official encoder has no dropout; its decoder's layer has, and its tail does not depend on it.
    assert ops == (["attention", "attention", "mask_scores"] if name == "official" else [])
    ops.clear()
    model.eval()(x)
    assert ops.count("attention") == (2 if name == "vit_tiny" else 3)


def test_masks_take_the_original_path(ops: list[str]) -> None:
    x, blocked = torch.randn(2, 6, 128, dtype=torch.float64), torch.ones(6, 6, dtype=torch.bool).tril()
    mm = MODELS["mmseg"]().double().eval().backbone.layers[0].attn
    cases = [
        (OfficialBlock(128, 2, 64, 0.0, 0.0).double(), {"mask": blocked}),
        (timm.layers.Attention(128, 2).double(), {"attn_mask": blocked}),
        (timm.layers.Attention(128, 2).double(), {"is_causal": True}),
        (mm, {"attn_mask": ~blocked}),
        (mm, {"key_padding_mask": torch.tensor([[False] * 5 + [True]] * 2)}),
        (mm, {"query_pos": torch.randn_like(x)}),
        (mm, {"key": torch.randn_like(x)}),
        (mm, {"residual": torch.randn_like(x)}),
    ]
    for module, given in cases:
        sf.restore(module)
        expected, plain = module(x, **given), module(x)
        sf.accelerate(module)
        ops.clear()
        assert torch.equal(module(x, **given), expected)
        assert not ops
        torch.testing.assert_close(module(x), plain)
        assert ops == ["attention"]
        torch.testing.assert_close(module(x, **dict.fromkeys(given)), plain)


def test_official_attention_maps(ops: list[str]) -> None:
    model, x = build("official"), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model.encoder.get_attention_map(x, 1)
    sf.accelerate(model)
    ops.clear()
    maps = model.encoder.get_attention_map(x, 1)
    assert ops == ["attention"]  # of the layer before
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1], dtype=x.dtype))
    tokens = torch.randn(1, 17, 128, dtype=torch.float64)
    _, maps = model.encoder.blocks[0].attn(tokens)
    assert maps.shape == (1, 2, 17, 17)


def test_hooks_inside_see_what_they_saw(ops: list[str]) -> None:
    """Hooks on the probabilities, the usual way to attention maps, and on projections, the usual way to features."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, out: seen.__setitem__(name, out[1] if isinstance(out, tuple) else out)

    official, timms, x = build("official"), build("vit_tiny"), images("vit_tiny")
    timms.blocks[0].attn.fused_attn = False
    for model, inner in ((official, official.encoder.blocks[0].attn), (timms, timms.blocks[0].attn.attn_drop)):
        handle = inner.register_forward_hook(keep("map"))
        sf.accelerate(model)
        assert not seen, "trying the module out fired a hook"
        ops.clear()
        model(x)
        assert seen.pop("map").shape[-1] == 17
        assert ops.count("attention") == (2 if model is official else 1)
        handle.remove()
        ops.clear()
        model(x)
        assert ops.count("attention") == (3 if model is official else 2)
    timms.blocks[0].attn.qkv.register_forward_hook(keep("qkv"))
    timms.blocks[0].attn.register_forward_hook(keep("attn"))
    ops.clear()
    timms(x)
    assert seen["qkv"].shape == (2, 17, 3 * 192)
    assert seen["attn"].shape == (2, 17, 192)
    assert ops == ["attention"] * 2


def test_a_forward_set_later_is_the_one_that_runs(ops: list[str]) -> None:
    for name, find in (
        ("official", lambda model: model.encoder.blocks[0].attn),
        ("mmseg", lambda model: model.backbone.layers[0].attn.attn),
        ("vit_tiny", lambda model: model.blocks[0].attn),
    ):
        model = sf.accelerate(build(name))
        inner, calls = find(model), []
        own = inner.forward
        inner.forward = lambda *args, own=own, calls=calls, **kwargs: calls.append(1) or own(*args, **kwargs)
        model(images(name))
        assert calls == [1], name


def test_symbolic_traces_are_those_of_the_original() -> None:
    block, x = OfficialBlock(128, 2, 64, 0.0, 0.0).double().eval(), torch.randn(2, 6, 128, dtype=torch.float64)
    model = nn.Sequential(block)
    expected = torch.fx.symbolic_trace(model).graph
    graph = torch.fx.symbolic_trace(sf.accelerate(model))
    assert [str(node) for node in graph.graph.nodes] == [str(node) for node in expected.nodes]
    torch.testing.assert_close(graph(x), block(x))


def test_a_norm_set_later_takes_the_original_path(ops: list[str]) -> None:
    attention, x = timm.layers.Attention(128, 2).double().eval(), torch.randn(2, 6, 128, dtype=torch.float64)
    sf.accelerate(attention)
    ops.clear()
    attention.q_norm = nn.LayerNorm(64, dtype=torch.float64)
    expected = sf.restore(copy.deepcopy(attention))(x)
    assert torch.equal(attention(x), expected)
    assert not ops


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", KINDS)
def test_on_a_gpu(name: str, dtype: torch.dtype, ops: list[str]) -> None:
    model, x = build(name, dtype).cuda(), images(name, dtype).cuda()
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    peer = outputs_and_gradients(model, x)
    ours = outputs_and_gradients(sf.accelerate(model), x)
    assert bool(ops) == (dtype != torch.float64)
    for key in ("out", "images"):
        assert_as_accurate(ours[key], peer[key], oracle[key])
