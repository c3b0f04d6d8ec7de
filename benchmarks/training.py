"""Training steps of whole models, ours against its peers: ``python -m segmenter_fast.benchmarks.training``.

A step is the forward pass, the loss, the backward pass and SGD with momentum, on ``(B, 3, S, S)`` images of random
numbers. Writes ``<out>/<device>/training.json`` after each case and ``training.png`` at the end.

Before anything is timed, every variant's loss and gradients on the same weights are compared with those of the
reference in float32. The error of a row is the relative one of the loss, or the largest of a layer's gradient
(``|g - g_reference| / |g_reference|`` over all its parameters), whichever is larger.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmenter_fast import VARIANTS, Segmenter, SegmenterConfig
from segmenter_fast.describe import count_macs
from segmenter_fast.devices import choose_dtype
from segmenter_fast.reference import ReferenceSegmenter

from .cases import OURS, Case, Variant
from .device import name_of, resolve
from .ops.upsample import block_target
from .ops.upsample_oracle import IGNORED
from .peers import with_sdpa
from .plots import draw
from .run import Run, add_options

OP = "training"
MODELS = ("t", "s", "b", "l")
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Point:
    """A training step: a mask transformer of size t, s, b or l, and what it is fed.

    Raises:
        ValueError: no image.
    """

    model: str = "t"
    patch: int = 16
    classes: int = 150
    size: int = 512
    batch: int = 2

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")

    @property
    def config(self) -> SegmenterConfig:
        """Nothing is dropped at random: every variant has to find the same gradients."""
        return VARIANTS[f"seg_{self.model}_mask_16"].replace(
            patch_size=self.patch,
            num_classes=self.classes,
            image_size=self.size,
            dropout=0.0,
            drop_path_rate=0.0,
            decoder_dropout=0.0,
            decoder_drop_path_rate=0.0,
        )


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where a case was refused because our loss or a gradient of ours was wrong."""
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.training", description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="may be given more than once, as the next two")
    parser.add_argument("--patch", action="append", type=int, help="patch size")
    parser.add_argument("--classes", action="append", type=int, help="number of classes")
    parser.add_argument("--size", type=int, help="pixels a side")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--no-compile", action="store_true", help="without the variants that torch.compile makes")
    add_options(parser)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        device = resolve(options.device)
        dtype = training_dtype(options.dtype, device)
        cases = [
            make_case(device, dtype, point, not options.no_compile)
            for point in chosen_points(device, options.quick, **_given(options))
        ]
    except ValueError as error:
        parser.error(str(error))
    run = Run.begin(device, {torch.float32, dtype}, options.out, options.quick, 1.0 if options.quick else 3.0)
    wrong = run.cases(OP, cases, None if options.budget is None else start + options.budget)
    for plot in draw(options.out / run.record.slug, (OP,)):
        run.console.print(f"{OP}: drew {plot}")
    return 1 if wrong else 0


def _given(options: argparse.Namespace) -> dict[str, Any]:
    fields = ("model", "patch", "classes", "size", "batch")
    return {name: getattr(options, name) for name in fields if getattr(options, name) is not None}


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """What ``name`` means on ``device``; float32 where that is float16, whose loss would have to be scaled."""
    dtype = choose_dtype(name, device)
    return torch.float32 if dtype is torch.float16 else dtype


def chosen_points(
    device: torch.device,
    quick: bool,
    model: Sequence[str] = (),
    patch: Sequence[int] = (),
    classes: Sequence[int] = (),
    size: int | None = None,
    batch: int | None = None,
) -> list[Point]:
    """The default steps of a device, most valuable first; with any of the other arguments, all their combinations."""
    cuda = device.type == "cuda"
    if quick:
        first = Point("s", batch=8) if cuda else Point(size=128, batch=1)
    else:
        first = Point("b", batch=8) if cuda else Point(size=256)
    if model or patch or classes or size is not None or batch is not None:
        shape = first.size if size is None else size, first.batch if batch is None else batch
        axes = (model or [first.model], patch or [first.patch], classes or [first.classes])
        return [Point(*values, *shape) for values in itertools.product(*axes)]
    make = partial(_changed, first)
    if quick:
        return [first, make(patch=32)]
    points = [first, make(classes=19), make(patch=32), make(patch=8), make(classes=1000), make(classes=59)]
    if cuda:
        points += [make(model="l"), make(model="s"), make(model="t")]
        points += [make(model="b", batch=1), make(model="b", size=1024, batch=2)]
    else:
        points += [make(size=512, batch=4), make(model="s")]
    return points


def _changed(point: Point, **fields: Any) -> Point:
    return Point(**(vars(point) | fields))


def make_case(device: torch.device, dtype: torch.dtype, point: Point, compiled: bool = True) -> Case:
    """The step of ``point`` by every variant, each in autocast to ``dtype`` but for the first.

    Raises:
        ValueError: sizes that no model has.
        MemoryError, torch.OutOfMemoryError: no room for one copy of the weights.
    """
    config = point.config
    weights = _Weights(config, device)
    peer = partial(_Step, partial(_sdpa_model, config), weights, dtype)
    ours = partial(_Step, partial(Segmenter, config), weights, dtype)
    reference = partial(ReferenceSegmenter, config)
    tokens = (point.size // point.patch) ** 2 + max(config.num_prefix_tokens, point.classes)
    heads = config.depth * config.num_heads + config.decoder_depth * config.decoder_num_heads
    # Kept for the backward pass: the probabilities of every head; the logits and their log-softmax.
    scores, logits = point.batch * heads * tokens**2, point.batch * point.classes * point.size**2
    variants: dict[str, Variant | str] = {
        "eager": _Step(reference, weights, torch.float32).variant(4 * scores + 8 * logits),
    }
    if dtype is not torch.float32:
        variants["eager AMP"] = _Step(reference, weights, dtype).variant(dtype.itemsize * scores + 6 * logits)
    compiled_steps: dict[str, Variant | str] = {
        "compile": peer(compiled=True).variant(4 * logits),
        f"{OURS} compiled": ours(compiled=True).variant(),
    }
    variants[OURS] = ours().variant()
    variants |= compiled_steps if compiled else dict.fromkeys(compiled_steps, "left out by --no-compile")
    order = ("eager", "eager AMP", "compile", OURS, f"{OURS} compiled")
    return Case(
        parameters={"op": OP, **vars(point), "model": f"seg_{point.model}_mask", "dtype": name_of(dtype)},
        device=device,
        dtype=dtype,
        make_inputs=partial(_inputs, point),
        judge=partial(_judge, config, weights),
        variants={name: variants[name] for name in order if name in variants},
        # Each matrix product of the forward pass has two in the backward pass.
        flops=3 * 2 * count_macs(config, point.size) * point.batch,
        images=point.batch,
    )


class _Weights:
    """The weights that every variant starts a check from, made when they are first needed."""

    def __init__(self, config: SegmenterConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.state: dict[str, Tensor] | None = None

    def load(self, model: nn.Module) -> None:
        if self.state is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made = Segmenter(self.config)
            self.state = {name: value.to(self.device) for name, value in made.state_dict().items()}
        model.load_state_dict(self.state)


class _Step:
    """One variant's model and optimizer, made at the first use; a call of ``run`` is one training step."""

    def __init__(self, make: Callable[[], Any], weights: _Weights, dtype: torch.dtype, compiled: bool = False) -> None:
        self.make = make
        self.weights = weights
        self.dtype = dtype
        self.compiled = compiled
        self.model: Any = None

    def variant(self, needs_bytes: int = 0) -> Variant:
        return Variant(self.run, self.prepare, needs_bytes)

    def prepare(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Back to the first weights."""
        if self.model is None:
            self.model = self.make().to(images.device).train()
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
            self.loss = self.model.loss
            if self.compiled:
                self.loss = torch.compile(self.model.loss, fullgraph=True, dynamic=False)
        self.weights.load(self.model)
        return images, target

    def run(self, images: Tensor, target: Tensor) -> tuple[Tensor, Gradients]:
        """The loss, and the gradients that the optimizer was given."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            loss = self.loss(images, target)
        loss.backward()
        self.optimizer.step()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), gradients


def _sdpa_model(config: SegmenterConfig) -> nn.Module:
    return with_sdpa(ReferenceSegmenter(config), torch.float32)


def _inputs(point: Point, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    side, device = point.size, generator.device
    images = torch.randn((point.batch, 3, side, side), generator=generator, device=device)
    return images, block_target((point.batch, point.classes), (side, side), generator)


def _judge(
    config: SegmenterConfig, weights: _Weights, inputs: tuple[Tensor, Tensor]
) -> Callable[[tuple[Tensor, Gradients]], float]:
    """The reference in float32, image by image: its memory is that of one."""
    images, target = inputs
    reference = ReferenceSegmenter(config).to(images.device).train()
    weights.load(reference)
    valid = (target != IGNORED).sum()
    expected = torch.zeros((), device=images.device)
    for image, labels in zip(images.split(1), target.split(1), strict=True):
        loss = F.cross_entropy(reference(image), labels, ignore_index=IGNORED, reduction="sum") / valid
        loss.backward()
        expected += loss.detach()
    oracle = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    return partial(_error, expected, oracle)


def _error(loss: Tensor, oracle: Gradients, output: tuple[Tensor, Gradients]) -> float:
    """As the module says; infinity where parameters differ, NaN where a value is."""
    found, gradients = output
    if gradients.keys() != oracle.keys():
        return float("inf")
    layers: dict[str, list[str]] = {}
    for name in oracle:
        words = name.split(".")
        layers.setdefault(".".join(words[:3] if words[1] == "blocks" else words[:1]), []).append(name)
    errors = [(found - loss).abs() / loss.abs()]
    for names in layers.values():
        off = torch.stack([(gradients[name] - oracle[name]).norm() for name in names]).norm()
        errors.append(off / torch.stack([oracle[name].norm() for name in names]).norm())
    return torch.stack(errors).max().item()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the cases that were finished are written")
