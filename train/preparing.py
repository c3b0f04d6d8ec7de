"""From a model and a recipe to what is trained: placed, frozen, averaged, compiled, spread over processes."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..processes import World
from ..segmenter import Segmenter
from .checkpoints import Training
from .distributed import parallel, same_weights, shard
from .optimization import freeze, make_optimizer, make_schedule
from .presets import Recipe
from .stepping import SummedLoss


def prepare(
    model: Segmenter, ignore_index: int, recipe: Recipe, total_steps: int, dtype: torch.dtype, world: World
) -> tuple[nn.Module, Training]:
    """The module to call for the loss, and all that changes from step to step. The model itself is trained.

    Raises:
        ValueError: the recipe freezes everything, or more layers than there are.
    """
    freeze(model, recipe)
    model.to(world.device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    same_weights(model, world)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
    module: nn.Module = SummedLoss(model, ignore_index, recipe.label_smoothing)
    if recipe.compile:
        module.compile()
    module = parallel(module, recipe.parallel, world)
    if ema is not None and isinstance(module, FSDPModule):
        shard(ema.module, world)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    return module, Training(model, optimizer, make_schedule(optimizer, recipe, total_steps), scaler, ema)


def whole_model(training: Training, world: World) -> Segmenter:
    """The model to evaluate, whole in every process; a copy where it is sharded. Every process must call it."""
    model = training.averaged
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole = Segmenter(training.model.config).to(world.device)
    whole.load_state_dict(state)
    return whole
