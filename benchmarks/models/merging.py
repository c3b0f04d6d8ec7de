"""Token merging: speed of a schedule, and how many labels it keeps.

Without labelled data, the labels are those of real weights on real photographs: the scores of a patch are the cosines
of its feature to 21 k-means centres of the features of all photographs, upsampled bilinearly. The labels kept are those
equal to the exact model's in float32; the notes have those of crops. Other models have random weights, whose tokens say
nothing about agreement: for them only the speed counts.
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
from segmenter_fast.inference_segmenter import InferenceSegmenter
from segmenter_fast.io.images import normalise, read_image
from segmenter_fast.token_merging import MERGING, TokenMerging

from ..case import OURS, Row
from ..results import RESULTS
from ..runner import Runner
from ..timing import measure, own_stream
from .peers import ModelCase, build, centre

REAL, SIDE, CLASSES, STEPS = "seg_s_dinov2_linear_14", 518, 21, 30
SPEED = ("seg_t_mask_16", "seg_s_mask_16", "seg_b_mask_16", "seg_s_mask_8")
# Rounding decides between tokens that are about as alike, and few labels with them.
SAME = 0.97
NAMED: dict[str, TokenMerging | None] = {"exact": None, **MERGING}
UNIFORM = {f"{share:.0%} each": replace(MERGING["fast"], share=share) for share in (0.03, 0.05, 0.09, 0.15)}
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
        dtype: "auto" is float32 and, where the device multiplies another one faster, that, too.

    Returns:
        The number of schedules that were refused, because the optimized model's labels are not the model's own.

    Raises:
        ValueError: weights without photographs, or an unknown variant or dtype.
    """
    if weights is not None and not photographs:
        raise ValueError("the labels that merging keeps are counted on photographs: give at least one")
    chosen = choose_dtype(dtype, device)
    kinds = [torch.float32] if dtype == "auto" and chosen != torch.float32 else []
    runner = Runner.start(device, [*kinds, chosen], out, False, seconds)
    result = runner.result("merging")
    cases: list[tuple[ModelCase, Callable[[], tuple[Segmenter, Tensor]], Schedules]] = []
    for kind in (*kinds, chosen):
        compiled = choose_compile("auto", device, kind)
        if weights is not None:
            case = ModelCase(REAL, kind, SIDE, classes=CLASSES, compile=compiled)
            cases.append((case, partial(real_model, weights, photographs, device), {**NAMED, **UNIFORM}))
        for variant in variants or SPEED:
            case = ModelCase(variant, kind, compile=compiled)
            cases.append((case, partial(_random_model, case, device), NAMED))
    for case, make, schedules in cases:
        with own_stream(device), torch.inference_mode():
            model, images = make()
            crops = corners(photographs, model, device) if case.variant == REAL else None
            rows = measure_schedules(model, images, schedules, case, seconds, crops)
        result.refused += [f"{case.variant}, {row.variant}: {row.note}" for row in rows if row.status == "refused"]
        parameters = {**case.parameters, "tokens": model.config.num_prefix_tokens + _patches(model)}
        runner.keep(result, parameters, rows, case.variant)
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
    model.decoder = Cosines(centres_of(features))  # type: ignore[assignment]
    return model, images


def corners(photographs: Sequence[Path], model: Segmenter, device: torch.device) -> Tensor:
    """Top left and bottom right corner of each photograph, 80 % of its smaller side: ``(2 B, 3, S, S)``."""
    crops = []
    for path in photographs:
        pixels = read_image(str(path))
        side = int(0.8 * min(pixels.shape[:2]))
        crops += [pixels[:side, :side], pixels[-side:, -side:]]
    mean, std = model.config.mean, model.config.std
    return torch.cat([normalise(centre(crop, SIDE), mean, std, device) for crop in crops])


def centres_of(features: Tensor) -> Tensor:
    """``(N, D)`` unit vectors -> ``(21, D)`` k-means centres by cosine."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    centres = features[order[:CLASSES].to(features.device)]
    for _ in range(STEPS):
        nearest = F.one_hot((features @ centres.T).argmax(1), CLASSES).to(features.dtype)
        centres = F.normalize(nearest.T @ features, dim=1)
    return centres


def measure_schedules(
    model: Segmenter,
    images: Tensor,
    schedules: Schedules,
    case: ModelCase,
    seconds: float,
    crops: Tensor | None = None,
) -> list[Row]:
    """Time ``optimize(merge=...)`` on one image, schedule by schedule in turns; count the labels kept on all images.

    These labels are compared in float32, so that they tell what merging changes, not what rounding does. A schedule is
    refused where the optimized form, in float32, disagrees with the model that it was made from.
    """
    calls: dict[str, list[Callable[[], object]]] = {}
    rows, depth, patches = [], model.config.depth, _patches(model)
    expected = _labels(model, images) if case.variant == REAL else None
    of_crops = None if crops is None else _labels(model, crops)
    for name, schedule in schedules.items():
        merging = schedule if depth == 12 or schedule is None else TokenMerging.of(name, depth)
        left = merging.tokens_left(patches, depth) if merging else [patches]
        row = Row(f"{OURS} {name}", "ok", f"{left[-1]} of {patches} patch tokens left")
        form = model.optimize(torch.float32, compile=False, merge=merging or "none")
        labels = _labels(form, images)
        same = (labels == _labels(model.with_merging(merging), images)).float().mean().item()
        if same < SAME:
            rows.append(replace(row, status="refused", note=f"{same:.2%} of the labels are those of the model itself"))
            continue
        if expected is not None:
            row = replace(row, labels=(labels == expected).float().mean().item())
        if crops is not None and of_crops is not None:
            kept = (_labels(form, crops) == of_crops).float().mean((1, 2))
            row = replace(
                row, note=f"{row.note}; of crops {kept.mean():.2%} of the labels, {kept.min():.2%} of the worst"
            )
        rows.append(row)
        fast = model.optimize(case.dtype, merge=merging or "none")
        calls[row.variant] = [partial(fast.segment, image) for image in images.split(1)]
    outcomes = measure(calls, images.device, seconds=seconds, min_samples=6)
    return [row.timed(outcomes[row.variant], 1) if row.variant in outcomes else row for row in rows]


def _labels(model: Segmenter | InferenceSegmenter, images: Tensor) -> Tensor:
    return torch.cat([model.segment(image) for image in images.split(1)])


def _patches(model: Segmenter) -> int:
    rows, columns = model.config.grid
    return rows * columns


def _random_model(case: ModelCase, device: torch.device) -> tuple[Segmenter, Tensor]:
    model, _, images = build(case, device)
    return model, images
