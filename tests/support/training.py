"""A small data set, model and recipe for tests of training; as a program, one process of such a test.

``torchrun ... training.py ranks OUT FIELDS`` saves gradients of one step by DDP and FSDP2, trains with the recipe's
fields replaced, as JSON, is stopped by SIGTERM, goes on, and loses rank 1 in the fifth step.
``torchrun ... training.py gradients OUT FIELDS`` only saves the gradients, of GPUs where there are any.
``training.py slow OUT FIELDS`` trains until its second checkpoint is half written, and waits there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import segmenter_fast as sf
from segmenter_fast.processes import StopRequest, World, process_group
from segmenter_fast.train import run_folder
from segmenter_fast.train.engine import train
from segmenter_fast.train.presets import Recipe
from segmenter_fast.train.stepping import Stepper

RECIPE = Recipe(
    steps=6,
    batch_size=4,
    lr=0.05,
    resize=32,
    crop=32,
    window=32,
    stride=32,
    min_ratio=1.0,
    max_ratio=1.0,
    workers=0,
    precision="float32",
    evaluate_every=4,
    save_every=2,
    log_every=1,
    pictures=0,
)
MERGE = '{"layers": [0, 1], "share": 0.25}'


@dataclass(frozen=True)
class Squares:
    """Noise with a bright square, labels 0 and 1, ragged shares of ignored pixels; exact by (seed, index)."""

    length: int = 10
    seed: int = 0
    class_names: tuple[str, ...] = ("ground", "square")
    palette: tuple[tuple[int, int, int], ...] = ((0, 0, 0), (255, 255, 255))
    ignore_index: int = 255

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.default_rng([self.seed, index])
        image = draw.integers(0, 160, (32, 32, 3), dtype=np.uint8)
        labels = np.zeros((32, 32), np.uint8)
        top, left, side = draw.integers(2, 16, 3)
        image[top : top + side, left : left + side] += 90
        labels[top : top + side, left : left + side] = 1
        labels[: 1 + 3 * index % 29] = self.ignore_index
        return image, labels

    def name(self, index: int) -> str:
        return f"square-{index}"


class Signalled(Squares):
    """Squares that send this process a signal when so many have been read."""

    def __init__(self, reads: int, number: signal.Signals) -> None:
        super().__init__()
        self.__dict__.update(left=reads, number=number)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.__dict__["left"] -= 1
        if self.__dict__["left"] == 0:
            os.kill(os.getpid(), self.__dict__["number"])
        return super().read(index)


def small_model(recipe: Recipe = RECIPE, **fields: Any) -> sf.Segmenter:
    """Create a model with the same random weights every time."""
    torch.manual_seed(0)
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 2, "num_classes": 2}
    return sf.create_model("seg_t_mask_16", **{**small, "patch_size": 8, **recipe.model_fields(), **fields})


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the model of a checkpoint, or of a run's last one."""
    if path.is_dir():
        path = run_folder.checkpoint_path(path, run_folder.checkpoint_steps(path)[-1])
    return run_folder.read_checkpoint(path)["model"]


def first_batch(size: int = RECIPE.batch_size) -> tuple[torch.Tensor, torch.Tensor]:
    """``(size, 3, 32, 32)`` images and ``(size, 32, 32)`` labels of ``Squares``."""
    images, labels = zip(*(Squares().read(index) for index in range(size)), strict=True)
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 255, torch.tensor(np.stack(labels)).long()


# LayerNorm makes the rounding of two class scores that lie close together 40 times as large.
ROUNDING = 2e-5


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm, or to 0.05 where that is more."""
    return max(float((found[key] - one).norm() / one.norm().clamp(min=0.05)) for key, one in wanted.items())


def step_gradients(world: World, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return the whole gradients of one step on the first batch, by name."""
    model = small_model(recipe)
    stepper = Stepper(model, 255, recipe, 10, world)
    found: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()

    stepper.optimizer.register_step_pre_hook(keep)
    pixels, target = first_batch(recipe.batch_size)
    mine = slice(world.rank * recipe.batch_size // world.size, (world.rank + 1) * recipe.batch_size // world.size)
    stepper.step(pixels[mine], target[mine], StopRequest())
    return found


def _save_slowly() -> None:
    """Make torch.save write half of the second checkpoint, print its path, and wait."""
    whole = torch.save

    def half(content: dict[str, Any], path: Path) -> None:
        whole(content, path)
        if content["step"] > RECIPE.save_every:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            print(path, flush=True)
            time.sleep(600)

    torch.save = half


def _gradients(world: World, out: Path) -> None:
    """Save the gradients of one step by DDP and FSDP2, in one part and in two, and with merging."""
    for kind in ("ddp", "fsdp"):
        for accumulate in (1, 2):
            found = step_gradients(world, RECIPE.replace(parallel=kind, accumulate=accumulate, drop_path=0.0))
            if world.rank == 0:
                torch.save(found, out / f"{kind}-{accumulate}.pt")
    found = step_gradients(world, RECIPE.replace(merge=MERGE, drop_path=0.0))
    if world.rank == 0:
        torch.save(found, out / "merged.pt")


def _ranks(world: World, out: Path, fields: dict[str, Any]) -> None:
    """Run all tasks for two processes at once, because starting them takes long."""
    _gradients(world, out)
    recipe = RECIPE.replace(**fields)
    for reads, number in ((6, signal.SIGTERM), (4, signal.SIGKILL)):  # two reads a step
        data = Squares() if world.rank == 0 else Signalled(reads, number)
        options: dict[str, Any] = {"resume": "auto", "device": "cpu", "timeout": 60}
        result = train(small_model(recipe), data, Squares(4, 1), recipe, out / "run", **options)
        assert (result.steps, result.finished) == (3, False), result
        if world.rank == 0:
            (out / "stopped").touch()


def _main() -> None:
    task, out, fields = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if task == "ranks":
        with process_group("cpu", 60) as world:
            _ranks(world, out, fields)
    elif task == "gradients":
        with process_group("auto", 60) as world:
            _gradients(world, out)
    else:
        _save_slowly()
        recipe = RECIPE.replace(**fields)
        train(small_model(recipe), Squares(), Squares(4, 1), recipe, out, device="cpu")


if __name__ == "__main__":
    _main()
