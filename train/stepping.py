"""A model under training: made ready by the recipe, one optimizer step, the state that a checkpoint holds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..devices import choose_dtype
from ..processes import StopRequest, World
from ..segmenter import Segmenter
from ..weights.reading import CheckpointError
from .optimization import freeze, make_optimizer, make_schedule
from .presets import Recipe

FORMAT_VERSION = 1
STAIRS = 4
"""Steps in which the shares of token merging rise over ``merge_warmup``."""


class SummedLoss(nn.Module):
    """A model's fused loss, summed over labelled pixels, as the forward pass that DDP, FSDP and compile wrap."""

    def __init__(self, model: Segmenter, ignore_index: int, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.ignore_index, self.label_smoothing = model, ignore_index, label_smoothing
        self.weight: Tensor | None = None
        """``(K,)`` float32 weights of the classes."""

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return self.model.loss(images, target, self.ignore_index, self.weight, self.label_smoothing, "sum")


class StepResult(NamedTuple):
    """Figures of an optimizer step, the same in every process."""

    loss: float
    """Mean over the labelled pixels of all processes' images."""
    norm: float
    """Norm of the gradient before it is clipped."""
    lr: float
    updated: bool
    """True where the weights changed; they do not where loss or gradient are not finite."""
    overflow: bool
    """True where the gradient only exceeded float16's range; the scaler tries a smaller factor next."""
    stop: bool
    """True where any process was asked to stop."""


class Stepper:
    """A model with its optimizer, schedule, loss scaler and average; the model is trained in place.

    The gradient is that of the mean loss over the labelled pixels of the whole batch. Pixels count alike however the
    images are spread over processes and parts: every part's loss is a sum, divided by the number of labelled pixels of
    the whole batch, which the processes add up first. With weights of the classes a pixel counts by that of its class,
    in both.

    Raises:
        ValueError: the recipe freezes everything, or more layers than there are.
    """

    def __init__(self, model: Segmenter, ignore_index: int, recipe: Recipe, total_steps: int, world: World) -> None:
        self.model, self.ignore_index, self.recipe, self.world = model, ignore_index, recipe, world
        self.steps = 0
        """Optimizer steps done."""
        self.dtype = choose_dtype(recipe.precision, world.device)
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        freeze(model, recipe)
        model.to(world.device)
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if world.size > 1:  # every process begins with the first one's weights
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0)
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
        self.loss = SummedLoss(model, ignore_index, recipe.label_smoothing)
        self.module: nn.Module = self.loss
        if recipe.compile:
            self.module.compile()
        self.sharded = world.size > 1 and recipe.parallel == "fsdp"
        if self.sharded:
            shard(self.module, world)
            if self.ema is not None:
                shard(self.ema.module, world)
        elif world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.module = DistributedDataParallel(self.module, device_ids=devices, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(model, recipe)
        self.schedule = make_schedule(self.optimizer, recipe, total_steps)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        merging = model.config.merging
        if recipe.merge_warmup and merging is None:
            raise ValueError(f"merge_warmup={recipe.merge_warmup} needs token merging, such as --merge fast; got none")
        # The same objects at every step: the compiler compiles again for another one.
        self.mergings = [merging and merging.fewer(stair / STAIRS) for stair in range(STAIRS)] + [merging]

    def weigh(self, weights: Sequence[float]) -> None:
        """Weigh the classes in the loss, before the first step; no weights weigh them alike."""
        self.loss.weight = torch.tensor(weights, device=self.world.device) if weights else None

    def step(self, images: Tensor, labels: Tensor, request: StopRequest) -> StepResult:
        """Take one step on this process's ``(B, C, h, w)`` images and ``(B, h, w)`` labels.

        They are cut into the recipe's parts; every process must have as many. PyTorch's generators are seeded by
        (seed, step, rank), so that a resumed run draws what an uninterrupted one draws.
        """
        recipe, world = self.recipe, self.world
        state = np.random.SeedSequence([recipe.seed, self.steps, world.rank]).generate_state(2)
        torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
        images = images.to(world.device, non_blocking=True, memory_format=self.layout)
        labels = labels.to(world.device, non_blocking=True)
        counted = labels != self.ignore_index
        if self.loss.weight is None:
            labelled = counted.sum().double()
        else:
            labelled = (self.loss.weight[labels.where(counted, 0)] * counted).sum(dtype=torch.float64)
        if world.size > 1:
            dist.all_reduce(labelled)
        # Times size, as the processes' gradients are averaged.
        share = (world.size / labelled.where(labelled > 0, 1)).float()
        total = torch.zeros((), device=world.device)
        parts = list(zip(images.chunk(recipe.accumulate), labels.chunk(recipe.accumulate), strict=True))
        stair = STAIRS * self.steps // recipe.merge_warmup if recipe.merge_warmup else STAIRS
        self.model.encoder.merging = self.mergings[min(stair, STAIRS)]
        for number, (part, target) in enumerate(parts, 1):
            last = number == len(parts)
            wait: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if isinstance(self.module, FSDPModule):  # gradients are exchanged with the last part only
                self.module.set_requires_gradient_sync(last)
            elif isinstance(self.module, DistributedDataParallel) and not last:
                wait = self.module.no_sync()
            with wait:
                with torch.autocast(world.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    loss = self.module(part, target) * share
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.model.encoder.merging = self.model.config.merging
        return self._update(total / world.size, request)

    def _update(self, loss: Tensor, request: StopRequest) -> StepResult:
        """Clip and apply the gradient, if all is finite, and advance schedule, scaler and average.

        All that the host needs to know is read at once: each read waits for the GPU.
        """
        lr = float(self.schedule.get_last_lr()[0])
        scale = self.scaler.scale(torch.ones_like(loss))  # 1 without a scaler
        self.scaler.unscale_(self.optimizer)
        trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])  # type: ignore[misc]
        norm = norm.full_tensor() if self.sharded else norm  # type: ignore[attr-defined]
        summed = torch.stack([loss, torch.full_like(loss, float(request.signal is not None))])
        if self.world.size > 1:
            dist.all_reduce(summed)
        loss_value, stops, norm_value, factor = torch.cat([summed, torch.stack([norm.float(), scale])]).tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            if self.recipe.clip:
                torch.nn.utils.clip_grads_with_norm_(trained, self.recipe.clip, norm)
            self.optimizer.step()  # the scaler's own would read again that the gradient is finite
            if self.ema is not None:
                self.ema.update_parameters(self.model)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        # PyTorch warns of a schedule that runs before its optimizer, which a skipped first step looks like.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        self.schedule.step()
        self.steps += 1
        overflow = math.isfinite(loss_value) and not finite and factor > 1
        return StepResult(loss_value, norm_value, lr, finite, overflow, stops > 0)

    @property
    def averaged(self) -> Segmenter:
        """The model to evaluate and to export: the average where there is one."""
        return self.model if self.ema is None else self.ema.module  # type: ignore[return-value]

    def whole_model(self) -> Segmenter:
        """Return the model to evaluate, a whole copy where it is sharded. Every process must call it."""
        if not self.sharded:
            return self.averaged
        state = get_model_state_dict(self.averaged, options=StateDictOptions(full_state_dict=True))
        whole = Segmenter(self.model.config).to(self.world.device)
        whole.load_state_dict(state)
        return whole

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint, see ``run_folder``, in the first process; every process must call it.

        Tensors may be the live ones: write them before the next step.
        """
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        average = self.ema and get_model_state_dict(self.averaged, options=whole)
        return {
            "format_version": FORMAT_VERSION,
            "step": self.steps,
            "model": get_model_state_dict(self.model, options=whole),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=whole),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema and {"model": average, "updates": int(self.ema.n_averaged)},
        }

    def load_state_dict(self, content: dict[str, Any] | None) -> None:
        """Restore the content of a checkpoint in every process; only the first one needs to have it. It is used up.

        Raises:
            CheckpointError: it holds another model, or an average where the recipe wants none, or the other way round.
        """
        plain = content and {key: content[key] for key in ("step", "schedule", "scaler")}
        if content and plain:
            plain |= {"has_ema": content["ema"] is not None, "updates": (content["ema"] or {}).get("updates")}
        plain = self.world.broadcast(plain)
        assert plain is not None
        name = f"the checkpoint of step {plain['step']}"
        if plain["has_ema"] != (self.ema is not None):
            raise CheckpointError(f"{name} has {'an' if plain['has_ema'] else 'no'} average of weights")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.world.size > 1)
        held = content or {"model": {}, "optimizer": {}, "ema": {"model": {}}}
        try:
            set_model_state_dict(self.model, held["model"], options=options)
            set_optimizer_state_dict(self.model, self.optimizer, held["optimizer"], options=options)
            if self.ema is not None:
                set_model_state_dict(self.averaged, held["ema"]["model"], options=options)
                self.ema.n_averaged.fill_(plain["updates"])
            self.schedule.load_state_dict(plain["schedule"])
            self.scaler.load_state_dict(plain["scaler"])
            factors = [of(plain["step"]) for of in self.schedule.lr_lambdas]
            rates = [base * factor for base, factor in zip(self.schedule.base_lrs, factors, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):  # the run may be longer now
                group["lr"] = rate
            self.schedule._last_lr = rates
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{name} does not fit the model, or is damaged: {reason}") from error
        self.steps = plain["step"]


def shard(model: nn.Module, world: World) -> None:
    """Shard every layer, and what is outside of layers, over all processes (FSDP2), in place."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for blocks in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
