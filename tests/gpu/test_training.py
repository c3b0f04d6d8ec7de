"""Training on a GPU against the CPU in float32: precision, compiler, checkpointing, DDP and FSDP2, whole runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from segmenter_fast.processes import StopRequest, World
from segmenter_fast.train.engine import train
from segmenter_fast.train.logs import read_log
from segmenter_fast.train.optimization import recomputed
from segmenter_fast.train.stepping import Stepper, SummedLoss, shard
from support import training as support
from support.training import RECIPE, Signalled, Squares, first_batch, small_model, step_gradients

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
STEPS = 4
PLAIN = RECIPE.replace(drop_path=0.0, lr=0.01)
# Fields of the recipe, and the share of the update that precision and the skipped steps of a scaler change.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({}, 0.05),
    "float32, in parts, averaged": ({"accumulate": 2, "ema": 0.9, "clip": 0.5}, 0.05),
    "AdamW": ({"optimizer": "adamw", "lr": 1e-3}, 0.25),  # signs of the smallest gradients
    "bfloat16": ({"precision": "bfloat16"}, 0.2),
    "float16, scaled": ({"precision": "float16"}, 0.4),
    "bfloat16, compiled": ({"precision": "bfloat16", "compile": True}, 0.2),
    "bfloat16, channels last": ({"precision": "bfloat16", "channels_last": True}, 0.2),
}


def trained(fields: dict[str, Any], device: torch.device) -> tuple[list[float], Tensor]:
    """Losses of the steps that changed the weights, all on one batch, and the change of all weights."""
    recipe = PLAIN.replace(**fields)
    stepper = Stepper(small_model(recipe, embed_dim=128), 255, recipe, 10, World(device=device))

    def weights() -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in stepper.model.parameters()]).cpu()

    before, losses, overflows = weights(), list[float](), 0
    batch = first_batch()
    while len(losses) < STEPS:
        result = stepper.step(*batch, StopRequest())
        overflows += result.overflow
        assert result.updated or (result.overflow and overflows < 4), result
        losses += [result.loss] * result.updated
    return losses, weights() - before


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_cpu_in_float32(case: str) -> None:
    fields, tolerance = CASES[case]
    wanted_losses, wanted = trained({**fields, "precision": "float32", "compile": False}, torch.device("cpu"))
    losses, change = trained(fields, DEVICE)
    assert losses == pytest.approx(wanted_losses, rel=0.1)
    assert losses[-1] < 0.7 * losses[0]
    assert (change - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("fields", [{}, {"precision": "float16", "optimizer": "adamw", "clip": 1.0, "ema": 0.9}])
def test_a_step_waits_for_the_gpu_once(fields: dict[str, Any]) -> None:
    recipe = RECIPE.replace(**fields)
    stepper = Stepper(small_model(recipe, embed_dim=128), 255, recipe, 10, World(device=DEVICE))
    batch = [tensor.pin_memory() for tensor in first_batch()]
    stepper.step(*batch, StopRequest())
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchronizing") as found:
            stepper.step(*batch, StopRequest())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in found if "synchronizing" in str(one.message)]) == 1


def test_muon_iterates_in_bfloat16_and_learns_as_on_the_cpu() -> None:
    """A matrix's smallest directions are rounding, which Muon makes as large as the others: losses are compared."""
    fields = {"optimizer": "muon", "lr": 2e-3}
    (wanted, _), (losses, _) = (trained(fields, device) for device in (torch.device("cpu"), DEVICE))
    assert losses == pytest.approx(wanted, rel=0.02)
    assert losses[-1] < 0.7 * losses[0]


def test_activation_checkpointing_gives_the_gradients_with_less_memory() -> None:
    model = small_model(embed_dim=128, depth=8, drop_path_rate=0.0).to(DEVICE).train()
    images, target = torch.randn(8, 3, 96, 96, device=DEVICE), torch.randint(0, 2, (8, 96, 96), device=DEVICE)
    found, memory = [], []
    for block in (nullcontext(), recomputed(model)):
        torch.cuda.reset_peak_memory_stats(DEVICE)
        with block, torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model.loss(images, target)
        loss.backward()
        memory.append(torch.cuda.max_memory_allocated(DEVICE))
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    assert memory[1] < 0.85 * memory[0]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_of_nccl_gives_the_gradients_of_the_cpu(kind: str, one_process: None) -> None:
    images, target = first_batch()
    plain = small_model(embed_dim=128, drop_path_rate=0.0).train()
    plain.loss(images, target, reduction="sum").backward()

    model = small_model(embed_dim=128, drop_path_rate=0.0).train().to(DEVICE)
    module: Any = SummedLoss(model, 255, 0.0)
    if kind == "ddp":
        module = DistributedDataParallel(module, device_ids=[DEVICE], gradient_as_bucket_view=True)
    else:
        shard(module, World(device=DEVICE))
    module(images.to(DEVICE), target.to(DEVICE)).backward()
    for wanted, parameter in zip(plain.parameters(), model.parameters(), strict=True):
        found = parameter.grad.full_tensor() if kind == "fsdp" else parameter.grad
        assert found.device == DEVICE
        assert (found.cpu() - wanted.grad).norm() < 0.02 * wanted.grad.norm() + 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", support.__file__]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(support.__file__).parents[1])}
    arguments = [*program, "gradients", str(tmp_path), "{}"]
    done = subprocess.run(arguments, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wanted = step_gradients(World(device=DEVICE), PLAIN)
    for name in ("ddp-1", "ddp-2", "fsdp-1", "fsdp-2"):
        found = torch.load(tmp_path / f"{name}.pt", map_location=DEVICE)
        assert found.keys() == wanted.keys()
        assert max((found[key] - wanted[key]).norm() / wanted[key].norm() for key in wanted) < 0.02, name


def test_an_interrupted_run_is_that_of_the_cpu(tmp_path: Path) -> None:
    """Steps, checkpoints, evaluation and pictures; a signal ends the first part after the third step."""
    recipe = PLAIN.replace(pictures=1)
    model = partial(small_model, recipe, embed_dim=128)
    wanted = train(model(), Squares(), Squares(4, 1), recipe, tmp_path / "cpu", device="cpu")
    options: dict[str, Any] = {"out": tmp_path / "gpu", "resume": "auto", "device": DEVICE.type}
    first = train(model(), Signalled(9, signal.SIGTERM), Squares(4, 1), recipe, **options)
    assert (first.steps, first.finished) == (3, False)
    found = train(model(), Squares(), Squares(4, 1), recipe, **options)
    assert (found.steps, found.finished, found.skipped) == (recipe.steps, True, 0)
    losses = [
        [record["loss"] for record in read_log(tmp_path / folder) if record["kind"] == "step"]
        for folder in ("cpu", "gpu")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert found.scores.pixels == wanted.scores.pixels
    assert found.scores.aacc == pytest.approx(wanted.scores.aacc, abs=0.02)
