"""The processes of a training run: one code path for one process and for many.

Many are started by ``torchrun``, or by anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
They talk through nccl where they have GPUs, through gloo elsewhere. With one process nothing here communicates.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..devices import choose_device

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which process this is, among how many, and where it computes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The values added up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def shared(self, value: T) -> T:
        """The first process's value, in every process. Any picklable object."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def raise_together(self, error: Exception | None) -> None:
        """Raises the first process's error, if there is one, in every process: none waits for one that has stopped."""
        if (raised := self.shared(error)) is not None:
            raise raised


@contextmanager
def joined(device: str = "auto", timeout: float = 600.0) -> Iterator[World]:
    """Inside the block the processes that were started together can communicate. A group that is there already is used.

    Args:
        device: "auto", "cpu" or "cuda"; each process on a machine takes a GPU of its own.
        timeout: seconds that a process waits for the others, at the start and in every exchange.

    Raises:
        ConnectionError: (an OSError) the others cannot be reached in time, or were lost on the way.
        ValueError: no such device, more processes than GPUs, or variables of the environment that make no sense.
    """
    rank, size, local_rank = (_from_environment(name, default) for name, default in _VARIABLES)
    place = choose_device(device)
    if size == 1:
        yield World(place)
        return
    if not 0 <= rank < size:
        raise ValueError(f"RANK must be in [0, WORLD_SIZE={size}), got {rank}")
    if place.type == "cuda":
        place = choose_device(f"cuda:{local_rank}")
        torch.cuda.set_device(place)
    if dist.is_initialized():  # by the program around this
        yield World(place, rank, size)
        return
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    where = f"{os.environ.get('MASTER_ADDR', '(no MASTER_ADDR)')}:{os.environ.get('MASTER_PORT', '(no MASTER_PORT)')}"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:  # DistNetworkError, DistStoreError, a variable that is missing
        raise ConnectionError(
            f"rank {rank} of {size} cannot meet the others at {where} within {timeout:g} s: {_first_line(error)}; "
            "check that rank 0 runs there, that the port is open, and that all processes were started"
        ) from error
    try:
        yield World(place, rank, size)
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise ConnectionError(
            f"rank {rank} of {size} lost the others: {_first_line(error)}; one of them ended or hangs, see its own "
            "message; start all of them again with --resume auto to go on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"the environment's {name} must be a whole number, got {text!r}")
    return int(text)


def _lost(error: RuntimeError) -> bool:
    """Whether the error tells of the connection. gloo's are plain RuntimeErrors that name its files or the peer."""
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "peer", "nccl"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


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
