"""A model spread over the processes of a training run: copied (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..processes import World


def same_weights(model: nn.Module, world: World) -> None:
    """Gives every process the first one's weights."""
    if world.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def shard(model: nn.Module, world: World) -> None:
    """Shards every layer, and what is outside of layers, over all processes (FSDP2), in place."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for blocks in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parallel(module: nn.Module, kind: str, world: World) -> nn.Module:
    """The module whose forward and backward passes average the gradients over all processes.

    Args:
        kind: "ddp" or "fsdp"; either is the module itself where there is one process.
    """
    if world.size == 1:
        return module
    if kind == "fsdp":
        shard(module, world)
        return module
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


def exchanging(module: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Whether a backward pass inside the block exchanges gradients, or lets them pile up for a later one."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
    elif isinstance(module, DistributedDataParallel) and not wanted:
        return module.no_sync()
    return contextlib.nullcontext()
