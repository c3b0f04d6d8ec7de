"""Training parity: the same small model, data and seed, trained with the plain reference and with the fast kernels.

``python -m segmenter_fast.benchmarks.training_parity [--steps N] [--out DIR]`` writes ``training_parity.json`` and
``training_parity.png`` to the device's folder below DIR. Four runs for each seed:

    reference float32, fast float32     the curves differ by at most TOLERANCE, relative, at every step
    reference bfloat16, fast bfloat16   under autocast; the fast curve's distance to the float32 one is within noise

Noise is what a choice of the seed makes of the curve: the standard deviation of the float32 loss over the seeds, which
decide the initial weights while the data stay the same. Distance and noise are root mean squares over all steps but
the first, at which every seed's loss is the logarithm of the class count.

The data are drawn by (seed, step): smooth random regions, each class a colour of its own under noise. SGD with the
polynomial decay of the paper.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast.reference import ReferenceSegmenter

from .device import describe, resolve
from .plots import STYLE
from .results import write_json

TOLERANCE = 1e-4
RUNS = ("reference float32", "fast float32", "reference bfloat16", "fast bfloat16")


@dataclass(frozen=True)
class Setting:
    """What is trained on what; ``side`` in pixels."""

    side: int = 48
    patch: int = 8
    classes: int = 8
    batch: int = 4
    depth: int = 2
    lr: float = 0.2

    def model(self) -> sf.Segmenter:
        """With one head of 64 in each of its layers, and no stochastic depth."""
        return sf.create_model(
            "seg_t_mask_16",
            num_classes=self.classes,
            image_size=self.side,
            patch_size=self.patch,
            depth=self.depth,
            embed_dim=64,
            num_heads=1,
            decoder_num_heads=1,
            decoder_depth=1,
            drop_path_rate=0.0,
        )

    def data(self, step: int) -> tuple[Tensor, Tensor]:
        """``(B, 3, S, S)`` images and ``(B, S, S)`` labels with a border of ignored pixels; the same for every run."""
        generator = torch.Generator().manual_seed(step)
        colours = torch.randn(self.classes, 3, generator=torch.Generator().manual_seed(2**31))
        scores = torch.randn(self.batch, self.classes, 5, 5, generator=generator)
        target = F.interpolate(scores, size=(self.side, self.side), mode="bicubic").argmax(1)
        images = colours[target].permute(0, 3, 1, 2)
        images = images + 0.5 * torch.randn(images.shape, generator=generator)
        target[:, :2] = target[:, :, -3:] = 255
        return images, target


DEFAULT = Setting()


@dataclass(frozen=True)
class Parity:
    """Loss curves by run and seed, and what they say."""

    curves: dict[str, list[list[float]]]
    """For each of ``RUNS`` one curve a seed."""
    relative_difference: float
    """Largest over seeds and steps of |fast - reference| / reference, in float32."""
    noise: float
    """Root mean square over steps of the float32 loss's standard deviation over the seeds."""
    distances: dict[str, float]
    """Root mean square over seeds and steps of a bfloat16 curve's distance to the float32 reference's."""

    @property
    def holds(self) -> bool:
        """Whether both claims of the module's docstring are true, as far as they were tried."""
        near = self.distances.get("fast bfloat16", 0.0) <= self.noise
        return self.relative_difference <= TOLERANCE and near


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.training_parity", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    device = resolve(options.device)
    parity = compare(device, options.steps, options.seeds)
    print(f"float32: largest relative difference {parity.relative_difference:.1e}, allowed {TOLERANCE:.0e}")
    for run, distance in parity.distances.items():
        print(f"{run}: {distance:.4f} from float32; noise over {options.seeds} seeds {parity.noise:.4f}")
    if not parity.holds:
        print("refused: the curves differ by more than that, and nothing is written")
        return 1
    record = describe(device)
    content = {"device": asdict(record), "setting": asdict(DEFAULT), **asdict(parity)}
    path = write_json(content, options.out / record.slug / "training_parity.json")
    print(path, plot(path), sep="\n")
    return 0


def compare(
    device: torch.device, steps: int, seeds: int, setting: Setting = DEFAULT, runs: Sequence[str] = RUNS
) -> Parity:
    """Train all runs; ``runs`` may leave out those in bfloat16.

    Raises:
        ValueError: fewer than two seeds, whose curves have no spread, or fewer than two steps.
    """
    if seeds < 2 or steps < 2:
        raise ValueError(f"seeds and steps must be at least 2, got {seeds} and {steps}")
    curves = {run: [train(run, seed, steps, device, setting) for seed in range(seeds)] for run in runs}
    found = {run: np.array(losses)[:, 1:] for run, losses in curves.items()}  # (seeds, steps - 1)
    reference = np.array(curves["reference float32"])
    exact = found["reference float32"]
    return Parity(
        curves=curves,
        relative_difference=float((np.abs(np.array(curves["fast float32"]) - reference) / reference).max()),
        noise=float(np.sqrt(exact.var(0, ddof=1).mean())),
        distances={run: float(np.sqrt(((found[run] - exact) ** 2).mean())) for run in runs if "bfloat16" in run},
    )


def train(run: str, seed: int, steps: int, device: torch.device, setting: Setting) -> list[float]:
    """The loss of each step of one of ``RUNS``."""
    kind, dtype = run.split()
    torch.manual_seed(seed)
    model: sf.Segmenter | ReferenceSegmenter = setting.model()
    if kind == "reference":
        weights = model.state_dict()
        model = ReferenceSegmenter(model.config)
        model.load_state_dict(weights, strict=True)
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), setting.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    autocast = torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    losses = []
    for step in range(steps):
        images, target = (tensor.to(device) for tensor in setting.data(step))
        with autocast:
            loss = model.loss(images, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def plot(path: Path) -> Path:
    """Draw ``training_parity.png`` beside a ``training_parity.json``."""
    import matplotlib.pyplot as plt

    content = json.loads(path.read_text())
    curves = {run: np.array(losses) for run, losses in content["curves"].items()}
    reference = curves["reference float32"]
    steps = np.arange(1, reference.shape[1] + 1)
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.8))
        mean, deviation = reference.mean(0), reference.std(0, ddof=1)
        left.fill_between(steps, mean - deviation, mean + deviation, color="#7f7f7f", alpha=0.3, label="seeds")
        styles = {
            "reference float32": ("#7f7f7f", "-"),
            "fast float32": ("#d62728", "--"),
            "fast bfloat16": ("C0", ":"),
        }
        for run, (colour, line) in styles.items():
            left.plot(steps, curves[run][0], color=colour, linestyle=line, label=f"{run}, first seed")
        left.set(xlabel="step", ylabel="loss", title="loss; band: one standard deviation over the seeds")
        left.legend(frameon=False)
        differences = np.abs(curves["fast float32"] - reference) / reference
        middle.plot(steps, np.maximum(differences, 1e-9).T, color="#d62728", alpha=0.6)
        middle.axhline(TOLERANCE, color="black", linestyle="--", linewidth=1)
        middle.set(
            xlabel="step", yscale="log", title="fast to reference in float32, relative, each seed; line: allowed"
        )
        right.plot(steps[1:], deviation[1:], color="black", linestyle="--", label="noise: deviation over the seeds")
        for run, colour in (("reference bfloat16", "#7f7f7f"), ("fast bfloat16", "#d62728")):
            distance = np.sqrt(((curves[run] - reference) ** 2).mean(0))
            right.plot(steps[1:], distance[1:], color=colour, label=run)
        right.set(xlabel="step", yscale="log", ylim=(1e-5, None), title="bfloat16 to float32, absolute, over the seeds")
        right.legend(frameon=False, loc="lower left")
        figure.suptitle(f"{content['device']['name']}, PyTorch {content['device']['torch']}", fontsize=10)
        figure.savefig(path.with_suffix(".png"), dpi=110)
        plt.close(figure)
    return path.with_suffix(".png")


if __name__ == "__main__":
    sys.exit(main())
