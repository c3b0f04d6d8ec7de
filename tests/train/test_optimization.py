"""Schedule, groups of parameters, frozen layers; Muon against PyTorch's and the singular value decomposition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from segmenter_fast.train.optimization import Muon, freeze, make_optimizer, make_schedule, orthogonal, recomputed
from segmenter_fast.train.presets import Recipe
from support.training import RECIPE, small_model


def rates(recipe: Recipe, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], recipe.lr)
    schedule = make_schedule(optimizer, recipe, steps)
    found = []
    for _ in range(steps + 1):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_falls_as_the_official_polynomial() -> None:
    recipe = Recipe(lr=1e-3, min_lr=1e-5, power=0.9)
    found = rates(recipe, 10)
    assert found == pytest.approx([(1e-3 - 1e-5) * (1 - step / 10) ** 0.9 + 1e-5 for step in range(11)])
    assert found[0] == 1e-3
    assert found[-1] == pytest.approx(1e-5)


def test_the_rate_rises_in_the_warm_up() -> None:
    found, plain = rates(Recipe(warmup=4), 20), rates(Recipe(), 20)
    assert found[:4] == pytest.approx([plain[step] * (step + 1) / 5 for step in range(4)])
    assert found[4:] == pytest.approx(plain[4:])


def test_weight_decay_spares_biases_norms_and_tokens() -> None:
    model = small_model()
    decayed, spared = make_optimizer(model, Recipe(optimizer="adamw", weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    first, second = ({names[id(parameter)] for parameter in group["params"]} for group in (decayed, spared))
    assert first | second == set(names.values())
    assert {"encoder.patch_embed.proj.weight", "decoder.proj_patch", "encoder.blocks.0.mlp.fc1.weight"} <= first
    assert {"encoder.cls_token", "encoder.pos_embed", "decoder.cls_emb", "decoder.mask_norm.weight"} <= second


def test_the_optimizers_take_the_recipes_numbers() -> None:
    model = small_model()
    sgd = make_optimizer(model, Recipe(lr=0.2, momentum=0.7))
    adamw = make_optimizer(model, Recipe(optimizer="adamw", lr=0.2, beta1=0.8, beta2=0.95))
    assert isinstance(sgd, torch.optim.SGD)
    assert isinstance(adamw, torch.optim.AdamW)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"]) == (0.2, 0.7)
    assert adamw.defaults["betas"] == (0.8, 0.95)


def test_muon_takes_the_matrices_of_the_layers() -> None:
    model = small_model()
    recipe = Recipe(optimizer="muon", lr=0.2, momentum=0.7, beta1=0.8, beta2=0.95, weight_decay=0.1)
    groups = make_optimizer(model, recipe).param_groups
    assert [(group["orthogonal"], group["weight_decay"]) for group in groups] == [
        (True, 0.1),
        (False, 0.1),
        (False, 0.0),
    ]
    assert all((group["lr"], group["momentum"], group["betas"]) == (0.2, 0.7, (0.8, 0.95)) for group in groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden, others, _ = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    assert {"encoder.blocks.0.attn.qkv.weight", "decoder.blocks.0.mlp.fc2.weight"} <= hidden
    assert all(".blocks." in name and name.endswith(".weight") for name in hidden)
    assert {"encoder.patch_embed.proj.weight", "decoder.proj_patch", "decoder.proj_dec.weight"} <= others
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_frozen_layers_are_in_evaluation_mode_and_out_of_the_optimizer() -> None:
    model = small_model()
    freeze(model, RECIPE.replace(freeze_layers=1))
    assert [block.training for block in model.encoder.blocks] == [False, True]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("encoder.blocks.0.", "encoder.pos_embed", "encoder.cls")) for name in trained)
    assert len([p for group in make_optimizer(model, RECIPE).param_groups for p in group["params"]]) == len(trained)


def test_freezing_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match="freeze_layers must be at most 2, got 3"):
        freeze(small_model(), RECIPE.replace(freeze_layers=3))
    model = small_model().requires_grad_(False)
    with pytest.raises(ValueError, match="there is nothing to train"):
        make_optimizer(model, RECIPE)


def test_layers_are_recomputed_inside_the_block_only() -> None:
    model = small_model()
    images, target = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
    model.loss(images, target).backward()
    wanted = model.encoder.patch_embed.proj.weight.grad.norm()
    model.zero_grad()
    calls = []
    model.encoder.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    with recomputed(model):
        model.eval()
        model.loss(images, target).backward()
    assert len(calls) == 2
    model.eval().zero_grad()
    model.loss(images, target).backward()
    assert len(calls) == 3
    assert wanted > 0
    assert list(model.state_dict()) == list(small_model().state_dict())


@pytest.mark.parametrize("shape", [(48, 48), (24, 96), (96, 24), (1, 7)])
def test_singular_values_end_near_one_in_their_own_directions(shape: tuple[int, int]) -> None:
    matrix = 1e-4 * torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix) @ v.T
    values = found.diagonal()
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (found - torch.diag(values)).abs().max() < 1e-3
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_products_of_muon_are_fast_on_the_device(device: str, dtype: torch.dtype) -> None:
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if "mm" in function.__name__:
                seen.append((result.device.type, result.dtype))
            return result

    seen: list[Any] = []
    with FakeTensorMode(), Products():
        found = orthogonal(torch.empty(6, 4, device=device))
    assert found.dtype == torch.float32
    assert set(seen) == {(device, dtype)}


def test_matrices_follow_pytorchs_muon_and_the_rest_its_adamw() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(32, 64), torch.randn(64, 16), torch.randn(16)]
    ours, peers = ([torch.nn.Parameter(tensor.clone()) for tensor in tensors] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = Muon(
        [{"params": ours[:2], "orthogonal": True}, {"params": ours[2:]}], betas=(0.8, 0.9), momentum=0.7, **options
    )
    muon = torch.optim.Muon(peers[:2], momentum=0.7, adjust_lr_fn="match_rms_adamw", **options)
    adamw = torch.optim.AdamW(peers[2:], betas=(0.8, 0.9), **options)
    for _ in range(5):
        for left, right in zip(ours, peers, strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        for stepper in (optimizer, muon, adamw):
            stepper.step()
        assert all(torch.equal(left.grad, right.grad) for left, right in zip(ours, peers, strict=True))
    assert torch.equal(ours[2], peers[2])
    for left, right, start in zip(ours[:2], peers[:2], tensors[:2], strict=True):
        assert (left - right).norm() < 0.02 * (right - start).norm()
        assert (right - start).norm() > 0.005 * start.norm()


def test_what_is_no_matrix_cannot_become_orthogonal() -> None:
    group = {"params": [torch.nn.Parameter(torch.zeros(3))], "orthogonal": True}
    with pytest.raises(ValueError, match=r"orthogonal parameters must be matrices, got shape \(3,\)"):
        Muon([group], 1e-3, (0.9, 0.99), 0.0, 0.95)
