"""Training steps of whole models, ours against its peers.

A step is the forward pass, the loss, the backward pass and SGD with momentum, on ``(B, 3, S, S)`` images of random
numbers. ``training.json`` is written after each case, ``training.png`` at the end.

Before anything is timed, every variant's loss and gradients are compared with those of the float32 reference on the
same weights. The error of a row is the relative one of the loss, or the largest of a layer's gradient
(``|g - g_reference| / |g_reference|`` over all its parameters), whichever is larger.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast import Segmenter, SegmenterConfig
from segmenter_fast.config import variant_config
from segmenter_fast.describe import count_macs
from segmenter_fast.devices import choose_dtype
from segmenter_fast.reference import ReferenceSegmenter

from .case import OURS, Case, Variant
from .deadline import deadline_after
from .device import name_of
from .models.peers import with_sdpa
from .ops import in_turns
from .ops.upsample import IGNORED, block_target
from .results import RESULTS
from .runner import Runner

OP = "training"
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class StepShape:
    """A training step: a mask transformer of size t, s, b or l, and its input."""

    model: str = "t"
    patch: int = 16
    classes: int = 150
    size: int = 512
    batch: int = 2

    @property
    def config(self) -> SegmenterConfig:
        """Without dropout and stochastic depth, so that every variant has the same gradients."""
        return variant_config(f"seg_{self.model}_mask_16").replace(
            patch_size=self.patch,
            num_classes=self.classes,
            image_size=self.size,
            dropout=0.0,
            drop_path_rate=0.0,
            decoder_dropout=0.0,
            decoder_drop_path_rate=0.0,
        )


def run_training(
    models: Sequence[str] = (),
    patches: Sequence[int] = (),
    classes: Sequence[int] = (),
    size: int | None = None,
    batch: int | None = None,
    *,
    device: torch.device,
    dtype: str = "auto",
    compile: bool = True,
    quick: bool = False,
    out: Path = RESULTS,
    budget: float | None = None,
) -> int:
    """Time the steps of ``choose_steps`` within ``budget`` seconds; without ``compile`` no variant is compiled.

    Returns:
        The number of cases that were refused because our loss or a gradient of ours was wrong.

    Raises:
        ValueError: sizes that no model has.
    """
    deadline = deadline_after(budget)
    kind = training_dtype(dtype, device)
    steps = choose_steps(device, quick, models, patches, classes, size, batch)
    cases = [step_case(device, kind, step, compile) for step in steps]
    runner = Runner.start(device, {torch.float32, kind}, out, quick, 1.0 if quick or device.type == "cuda" else 3.0)
    refused = runner.run(in_turns({OP: cases}, {OP: 1}), deadline)
    runner.draw((OP,))
    return refused


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """``choose_dtype``, but float32 for float16, whose loss would have to be scaled."""
    dtype = choose_dtype(name, device)
    return torch.float32 if dtype is torch.float16 else dtype


def choose_steps(
    device: torch.device,
    quick: bool,
    models: Sequence[str] = (),
    patches: Sequence[int] = (),
    classes: Sequence[int] = (),
    size: int | None = None,
    batch: int | None = None,
) -> list[StepShape]:
    """The default steps of a device, most valuable first; with any of the other arguments, all their combinations."""
    cuda = device.type == "cuda"
    if cuda:
        first = StepShape("s" if quick else "b", batch=8)
    else:
        first = StepShape(size=128, batch=1) if quick else StepShape(size=256)
    if models or patches or classes or size is not None or batch is not None:
        shape = first.size if size is None else size, first.batch if batch is None else batch
        axes = (models or [first.model], patches or [first.patch], classes or [first.classes])
        return [StepShape(*values, *shape) for values in itertools.product(*axes)]
    if quick:
        return [first, replace(first, patch=32)]
    changes: list[dict[str, Any]] = [{}, {"classes": 19}, {"patch": 32}, {"patch": 8}]
    changes += [{"classes": 1000}, {"classes": 59}]
    if cuda:
        changes += [{"model": "l"}, {"model": "s"}, {"model": "t"}, {"batch": 1}, {"size": 1024, "batch": 2}]
    else:
        changes += [{"size": 512, "batch": 4}, {"model": "s"}]
    return [replace(first, **change) for change in changes]


def step_case(device: torch.device, dtype: torch.dtype, step: StepShape, compile: bool = True) -> Case:
    """The step by every variant, each in autocast to ``dtype`` except the first.

    Raises:
        ValueError: sizes that no model has.
    """
    config = step.config
    tokens = (step.size // step.patch) ** 2 + max(config.num_prefix_tokens, step.classes)
    heads = config.depth * config.num_heads + config.decoder_depth * config.decoder_num_heads
    # Kept for the backward pass: the probabilities of every head; the logits and their log-softmax.
    scores, logits = step.batch * heads * tokens**2, step.batch * step.classes * step.size**2
    models: list[tuple[str, Callable[[SegmenterConfig], Any], torch.dtype, int]] = [
        ("eager", ReferenceSegmenter, torch.float32, 4 * scores + 8 * logits),
        ("eager AMP", ReferenceSegmenter, dtype, dtype.itemsize * scores + 6 * logits),
        ("compile", lambda config: with_sdpa(ReferenceSegmenter(config), torch.float32), dtype, 4 * logits),
        (OURS, Segmenter, dtype, 0),
        (f"{OURS} compiled", Segmenter, dtype, 0),
    ]
    variants: dict[str, Variant | str] = {}
    for name, make, kind, needs_bytes in models:
        if "compile" in name and not compile:
            variants[name] = "left out by --no-compile"
        elif name != "eager AMP" or dtype is not torch.float32:
            run = _Step(partial(make, config), kind, "compile" in name)
            variants[name] = Variant(run, run.prepare, needs_bytes, late=device.type == "cuda" and "compile" in name)
    return Case(
        parameters={"op": OP, **vars(step), "model": f"seg_{step.model}_mask", "dtype": name_of(dtype)},
        device=device,
        dtype=dtype,
        make_inputs=partial(_inputs, step),
        judge=partial(_judge, config),
        variants=variants,
        # Each matrix product of the forward pass has two in the backward pass.
        flops=3 * 2 * count_macs(config, step.size) * step.batch,
        images=step.batch,
    )


@lru_cache(maxsize=1)
def _weights(config: SegmenterConfig) -> dict[str, Tensor]:
    """The weights with which every variant starts a check."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Segmenter(config).state_dict()


class _Step:
    """One variant's model and optimizer, made at the first use; a call is one training step."""

    def __init__(self, make: Callable[[], Any], dtype: torch.dtype, compiled: bool = False) -> None:
        self.make, self.dtype, self.compiled = make, dtype, compiled
        self.model: Any = None

    def prepare(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Load the first weights."""
        if self.model is None:
            self.model = self.make().to(images.device).train()
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
            loss = self.model.loss
            self.loss = torch.compile(loss, fullgraph=True, dynamic=False) if self.compiled else loss
        self.model.load_state_dict(_weights(self.model.config))
        return images, target

    def __call__(self, images: Tensor, target: Tensor) -> tuple[Tensor, Gradients]:
        """Take a step; return the loss and the gradients that the optimizer received."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            loss = self.loss(images, target)
        loss.backward()
        self.optimizer.step()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), gradients


def _inputs(step: StepShape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images = torch.randn((step.batch, 3, step.size, step.size), generator=generator, device=generator.device)
    return images, block_target((step.batch, step.classes), (step.size, step.size), generator)


def _judge(config: SegmenterConfig, inputs: tuple[Tensor, Tensor]) -> Callable[[tuple[Tensor, Gradients]], float]:
    """Compare with the reference in float32, which runs image by image to save memory."""
    images, target = inputs
    reference = ReferenceSegmenter(config).to(images.device).train()
    reference.load_state_dict(_weights(config))
    valid = (target != IGNORED).sum()
    expected = torch.zeros((), device=images.device)
    for image, labels in zip(images.split(1), target.split(1), strict=True):
        loss = F.cross_entropy(reference(image), labels, ignore_index=IGNORED, reduction="sum") / valid
        loss.backward()
        expected += loss.detach()
    oracle = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    return partial(_error, expected, oracle)


def _error(loss: Tensor, oracle: Gradients, output: tuple[Tensor, Gradients]) -> float:
    """The error of the module's docstring; infinity where parameters differ, NaN where a value is NaN."""
    found, gradients = output
    if gradients.keys() != oracle.keys():
        return float("inf")
    layers, expected = _by_layer(gradients), _by_layer(oracle)
    pairs = [(found, loss), *((layers[name], expected[name]) for name in expected)]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()


def _by_layer(gradients: Gradients) -> Gradients:
    """The gradients of each layer's parameters as one vector."""
    layers: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        words = name.split(".")
        layers.setdefault(".".join(words[: 3 if words[1] == "blocks" else 1]), []).append(gradient.flatten())
    return {layer: torch.cat(parts) for layer, parts in layers.items()}
