"""Peak memory of one training step, ours against the reference's.

``python -m segmenter_fast.benchmarks.training_memory`` prints a table and the ratio of the two, and writes
``training_memory.json`` to the device's folder below ``--out``.

A step is loss, backward pass and SGD with momentum, on random images and labels; what is held before it (weights,
momentum, inputs) does not count, gradients do. The compared models have the same weights and no stochastic depth, and
nothing is measured unless their losses and gradients agree.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import segmenter_fast as sf
from segmenter_fast.reference import ReferenceSegmenter

from .device import describe, resolve
from .peers import with_sdpa
from .results import write_json
from .timing import peak_memory

ALLOWED = 0.5
"""Largest ratio of our peak to the reference's."""
_LOSS, _GRADIENT = 1e-5, 1e-3


@dataclass(frozen=True)
class Setting:
    """One measurement; ``size`` is the side of the images in pixels."""

    variant: str = "seg_t_mask_16"
    batch: int = 4
    size: int = 512
    classes: int = 150


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.training_memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--variant", default=Setting.variant, choices=tuple(sf.VARIANTS))
    parser.add_argument("--batch", type=int, default=Setting.batch)
    parser.add_argument("--size", type=int, default=Setting.size)
    parser.add_argument("--classes", type=int, default=Setting.classes)
    options = parser.parse_args(arguments)
    setting = Setting(options.variant, options.batch, options.size, options.classes)
    device = resolve(options.device)
    peaks = step_peaks(setting, device)
    ratio = peaks["ours"] / peaks["reference"]
    shape = f"batch {setting.batch}, {setting.size} px, {setting.classes} classes"
    print(f"training step of {setting.variant}, {shape}, float32")
    for name, peak in peaks.items():
        print(f"{name:10} {peak / 2**20:8.0f} MiB")
    print(f"ours / reference: {ratio:.3f}, allowed {ALLOWED}")
    record = describe(device)
    content = {"device": asdict(record), "setting": asdict(setting), "peak_bytes": peaks, "ratio": ratio}
    print(write_json(content, options.out / record.slug / "training_memory.json"))
    return 0 if ratio <= ALLOWED else 1


def step_peaks(setting: Setting, device: torch.device) -> dict[str, int]:
    """Bytes that a step of each model needs beyond what is held before it.

    Raises:
        ValueError: the models' losses or gradients differ by more than rounding.
        OSError: nothing here can tell the peak.
    """
    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_classes": setting.classes, "image_size": setting.size, "drop_path_rate": 0.0}
    fast = sf.create_model(setting.variant, **fields).to(device).train()
    reference = ReferenceSegmenter(fast.config).to(device).train()
    reference.load_state_dict(fast.state_dict(), strict=True)
    models = {"reference": reference, "SDPA": with_sdpa(reference, torch.float32), "ours": fast}
    images = torch.randn(setting.batch, 3, setting.size, setting.size, device=device)
    target = torch.randint(setting.classes, (setting.batch, setting.size, setting.size), device=device)
    expected: tuple[float, float] | None = None
    peaks = {}
    for name, model in models.items():
        step = _step(model, images, target)
        found = step()  # the first one allocates the momentum, too
        expected = expected or found
        if not _agree(expected, found):
            raise ValueError(f"{name} must agree with the reference on loss and gradient {expected}, got {found}")
        model.zero_grad()
        gc.collect()
        peak = peak_memory(step, device)
        if peak is None:
            raise OSError("the peak of the resident memory can be read on Linux and on a GPU only")
        peaks[name] = peak
        model.zero_grad()
    return peaks


def _step(model: Any, images: Tensor, target: Tensor) -> Callable[[], tuple[float, float]]:
    """A training step that gives its loss and the norm of its gradient."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        loss = model.loss(images, target)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        return loss.item(), norm.item()

    return step


def _agree(expected: tuple[float, float], found: tuple[float, float]) -> bool:
    """Whether loss and norm of the gradient are the same but for rounding."""
    limits = zip(expected, found, (_LOSS, _GRADIENT), strict=True)
    return all(math.isclose(wanted, given, rel_tol=limit) for wanted, given, limit in limits)


if __name__ == "__main__":
    sys.exit(main())
