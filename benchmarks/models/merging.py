"""Token merging: speed of a schedule, and how many labels it keeps.

Without labelled data, the labels are those of real weights on real photographs: the scores of a patch are the cosines
of its feature to 21 k-means centres of the features of all photographs, upsampled bilinearly. The labels kept are those
equal to the exact model's in float32. Other models have random weights, whose tokens say nothing about agreement: for
them only the speed counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmenter_fast import Segmenter, create_model
from segmenter_fast.devices import choose_compile, choose_dtype
from segmenter_fast.io.images import normalise
from segmenter_fast.token_merging import MERGING, TokenMerging

from ..case import OURS, Row
from ..device import Ceilings
from ..results import RESULTS, write
from ..runner import Runner, case_table
from ..timing import measure, own_stream
from .peers import ModelCase, build, centre

REAL, SIDE, CLASSES, STEPS = "seg_s_dinov2_linear_14", 518, 21, 30
SPEED = ("seg_t_mask_16", "seg_s_mask_16", "seg_b_mask_16", "seg_s_mask_8")
EXACT = f"{OURS} exact"
NAMED: dict[str, TokenMerging | None] = {"exact": None, **MERGING}
UNIFORM = {f"{share:.0%} each": TokenMerging(tuple(range(2, 10)), share) for share in (0.03, 0.06, 0.09, 0.12, 0.15)}
Schedules = Mapping[str, TokenMerging | None]


class Cosines(nn.Module):
    """Decoder whose class scores are the cosines of features to ``(K, D)`` unit vectors."""

    def __init__(self, centres: Tensor) -> None:
        super().__init__()
        self.centres = nn.Parameter(centres)

    def forward(self, patches: Tensor, *_: Tensor | None) -> Tensor:
        return F.normalize(patches, dim=-1) @ self.centres.T


def run_merging(
    weights: Path | None,
    photographs: Sequence[Path],
    variants: Sequence[str] = (),
    dtype: str = "auto",
    *,
    device: torch.device,
    seconds: float = 6.0,
    out: Path = RESULTS,
) -> int:
    """Measure schedules of token merging and write ``merging.json``: with real weights, then each variant at 512 px.

    Args:
        weights: DINOv2 ViT-S/14 in any format that ``create_model(pretrained=)`` takes; None: only speeds.
        photographs: image files, whose centres are segmented, one at a time.

    Returns:
        The number of cases that were refused, because the exact model's labels are not those of plain PyTorch.

    Raises:
        ValueError: weights without photographs, or an unknown variant or dtype.
    """
    if weights is not None and not photographs:
        raise ValueError("the labels that merging keeps are counted on photographs: give at least one")
    kind = choose_dtype(dtype, device)
    runner = Runner.start(device, [torch.float32, kind], out, False, seconds)
    result = runner.result("merging")
    cases: list[tuple[ModelCase, Callable[[], tuple[Segmenter, Tensor]], Schedules]] = []
    if weights is not None:
        case = ModelCase(REAL, kind, SIDE, classes=CLASSES, compile=choose_compile("auto", device, kind))
        cases.append((case, partial(real_model, weights, photographs, device), {**NAMED, **UNIFORM}))
    for variant in variants or SPEED:
        case = ModelCase(variant, kind, compile=choose_compile("auto", device, kind))
        cases.append((case, lambda case=case: _random_model(case, device), NAMED))
    for case, make, schedules in cases:
        with own_stream(device), torch.inference_mode():
            model, images = make()
            rows = measure_schedules(model, images, schedules, case, runner.ceilings, seconds)
        parameters = {**case.parameters, "tokens": model.config.num_prefix_tokens + _patches(model)}
        result.cases.append((parameters, rows))
        write(result, out)
        runner.console.print(case_table(case.variant, rows))
        for row in rows:
            kept = "" if row.labels is None else f", {row.labels:.2%} of the labels of float32"
            runner.console.print(f"{row.variant}: {row.note}{kept}", highlight=False)
    runner.draw(["merging"])
    return len(result.refused)


def real_model(weights: Path, photographs: Sequence[Path], device: torch.device) -> tuple[Segmenter, Tensor]:
    """A model whose classes are k-means centres of the photographs' features, and the photographs ``(B, 3, S, S)``."""
    model = create_model(REAL, pretrained=str(weights), num_classes=CLASSES).to(device).eval()
    mean, std = model.config.mean, model.config.std
    images = torch.cat([normalise(centre(str(path), SIDE), mean, std, device) for path in photographs])
    features = F.normalize(torch.cat([model.encoder(image).flatten(0, 1) for image in images.split(1)]), dim=1)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    centres = features[order[:CLASSES].to(device)]
    for _ in range(STEPS):
        nearest = F.one_hot((features @ centres.T).argmax(1), CLASSES).to(features.dtype)
        centres = F.normalize(nearest.T @ features, dim=1)
    model.decoder = Cosines(centres)  # type: ignore[assignment]
    return model, images


def measure_schedules(
    model: Segmenter, images: Tensor, schedules: Schedules, case: ModelCase, ceilings: Ceilings, seconds: float
) -> list[Row]:
    """Time ``optimize(merge=...)`` on one image, schedule by schedule in turns; count the labels kept on all images.

    The labels are compared in float32, so that they tell what merging changes, not what rounding does.
    """
    calls: dict[str, list[Callable[[], object]]] = {}
    rows, depth, patches = [], model.config.depth, _patches(model)
    expected = _labels(model, images, None) if case.variant == REAL else None
    for name, merging in schedules.items():
        scheduled = merging and TokenMerging.of(merging if name not in MERGING else name, depth)
        fast = model.optimize(case.dtype, merge=scheduled)
        calls[f"{OURS} {name}"] = [partial(fast.segment, image) for image in images.split(1)]
        left = scheduled.tokens_left(patches, depth) if scheduled else [patches] * depth
        row = Row(f"{OURS} {name}", "ok", f"{left[-1]} of {patches} patch tokens left")
        if expected is not None:
            kept = (_labels(model, images, scheduled) == expected).float().mean()
            row = replace(row, labels=float(kept))
        rows.append(row)
    outcomes = measure(calls, images.device, seconds=seconds, min_samples=6)
    return [row.timed(outcomes[row.variant], 1) for row in rows]


def _labels(model: Segmenter, images: Tensor, merging: TokenMerging | None) -> Tensor:
    exact = model.optimize(torch.float32, compile=False, merge=merging)
    return torch.cat([exact.segment(image) for image in images.split(1)])


def _patches(model: Segmenter) -> int:
    rows, columns = model.config.grid
    return rows * columns


def _random_model(case: ModelCase, device: torch.device) -> tuple[Segmenter, Tensor]:
    model, _, images = build(case, device)
    return model, images
