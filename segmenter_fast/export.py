"""A model as a file that runs without this package: ONNX (.onnx), or an AOTInductor package (.pt2).

Every file is run and compared with the model before it appears under its name.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Pair
from .io.atomic import atomic_path
from .io.images import normalise
from .program import OUTPUTS, Program
from .segmenter import Segmenter

_SUFFIXES = (".onnx", ".pt2")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ONNX_BYTES = 2**31 - 2**24  # what one protobuf message holds, less some room for the graph
# Batches of a program for any batch: it is traced with the first and checked with the others.
_DYNAMIC_BATCHES = (3, 1, 2)

Run = Callable[[Tensor], Tensor]


class ExportError(ValueError):
    """Something that exporting needs is missing, or the exported program is not the model; the message says which."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what its check found."""

    path: Path
    pixels: int
    """Pixels whose labels were compared with the model's own."""
    differing: int
    """Those that the file labels otherwise, every one a tie within rounding."""


@dataclass(frozen=True)
class _Task:
    """What is asked for, checked."""

    path: Path
    size: Pair
    batch_size: int | None
    output: str
    uint8: bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.path.suffix not in _SUFFIXES:
            raise ValueError(f"file to export to must end in {' or '.join(_SUFFIXES)}, got {self.path}")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be (height, width), each at least 1, got {self.size}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or None for any, got {self.batch_size}")
        if self.output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype}")
        if self.path.suffix == ".onnx":
            if self.dtype == torch.bfloat16:
                raise ValueError("ONNX files have float32 or float16 weights: onnxruntime has no bfloat16 on a CPU")
            missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
            if missing:
                raise ExportError(f"ONNX files need {', '.join(missing)}: pip install 'segmenter-fast[export]'")
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder; name a file")
        if not self.path.parent.is_dir():
            raise NotADirectoryError(f"{self.path.parent}, where {self.path.name} is to be written, is no folder")


@torch.no_grad()
def export(
    model: Segmenter,
    path: str | os.PathLike[str],
    *,
    size: Pair | None = None,
    batch_size: int | None = 1,
    output: str = "labels",
    uint8: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """Writes a model for images of one size, and checks that the file gives the model's labels.

    The program has one input, ``images``: ``(B, 3, H, W)``, float32 and normalised, or uint8 RGB. It has one output,
    named as ``output`` says: "labels" ``(B, H, W)``, uint8 up to 256 classes and int32 above; "masks" ``(B, K, h, w)``
    float32 scores of the patches; "logits" ``(B, K, H, W)`` float32. It is made of PyTorch's own operators.

    A .pt2 package runs on the kind of device that the model is on. Class names, palette, mean, std and the like stand,
    as JSON values, in the ONNX file's ``metadata_props`` and in the package's ``get_metadata()``.

    The check runs the file on seeded random images. Its labels may differ from the model's only where, in float64, the
    two classes are as close as rounding: within four times the error of the model itself in ``dtype``.

    Args:
        model: what to export; it is not changed.
        path: the file, which ends in .onnx or .pt2; it is replaced, or left alone where anything fails.
        size: (height, width) of the images, by default the configuration's ``image_size``.
        batch_size: images at once; None for any number.
        output: "labels", "masks" or "logits".
        uint8: whether the program takes uint8 images and normalises them itself.
        dtype: of weights and activations; bfloat16 for .pt2 only.

    Raises:
        ValueError: an argument outside its range.
        ExportError: a package or the C++ compiler is missing, or the check failed.
        OSError: the file cannot be written.
    """
    height, width = model.config.image_size if size is None else size
    task = _Task(Path(path), (height, width), batch_size, output, uint8, dtype)
    model = copy.deepcopy(model).eval()
    with atomic_path(task.path) as written:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's exporters use what PyTorch deprecates
            run = (_write_onnx if task.path.suffix == ".onnx" else _write_pt2)(model, task, written)
        batches = _DYNAMIC_BATCHES[1:] if batch_size is None else (batch_size,)
        differing = sum(_check(model, task, run, batch) for batch in batches)
    return Exported(task.path, sum(batches) * height * width, differing)


def _write_onnx(model: Segmenter, task: _Task, path: Path) -> Run:
    """Writes one self-contained file; the program in onnxruntime."""
    import onnxruntime

    program = _program(model, task, torch.device("cpu"))
    if sum(tensor.nbytes for tensor in program.state_dict().values()) > _ONNX_BYTES:
        raise ValueError("the weights are over 2 GiB, more than an ONNX file holds; try float16 or .pt2")
    written = torch.onnx.export(
        _trace(program, task, torch.device("cpu")),
        input_names=["images"],
        output_names=[task.output],
        dynamic_shapes=_dynamic_shapes(task),  # for the name of the axis
        external_data=False,
        verbose=False,
    )
    assert written is not None
    written.model.metadata_props.update(_metadata(model, task))
    written.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_pt2(model: Segmenter, task: _Task, path: Path) -> Run:
    """Compiles and packages for the model's device; the program as PyTorch loads it."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    device = next(model.parameters()).device
    traced = _trace(_program(model, task, device), task, device)
    try:
        options = {"aot_inductor.metadata": _metadata(model, task)}
        aoti_compile_and_package(traced, package_path=str(path), inductor_configs=options)
    except InductorError as error:
        if not isinstance(error.inner_exception, (InvalidCxxCompiler, CppCompileError)):
            raise
        raise ExportError(f".pt2 packages need a working C++ compiler, such as g++ ({error})") from error
    package = aoti_load_package(str(path))
    return lambda images: package(images.to(device)).cpu()


def _program(model: Segmenter, task: _Task, device: torch.device) -> Program:
    return Program(model, task.size, task.output, task.uint8, task.dtype).to(device)


def _trace(program: Program, task: _Task, device: torch.device) -> torch.export.ExportedProgram:
    dtype = torch.uint8 if task.uint8 else torch.float32
    images = torch.zeros(task.batch_size or _DYNAMIC_BATCHES[0], 3, *task.size, dtype=dtype, device=device)
    # The other way of tracing takes len(images) for a constant.
    return torch.export.export(program, (images,), dynamic_shapes=_dynamic_shapes(task), strict=True)


def _dynamic_shapes(task: _Task) -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("batch", min=1)} if task.batch_size is None else None}


def _metadata(model: Segmenter, task: _Task) -> dict[str, str]:
    """What a user of the file needs to know, as JSON values."""
    config = model.config
    facts = {
        "variant": config.variant,
        "image_size": task.size,
        "input": "uint8 RGB" if task.uint8 else "float32 RGB in [0, 1], minus mean, divided by std",
        "output": task.output,
        "dtype": str(task.dtype).removeprefix("torch."),
        "mean": config.mean,
        "std": config.std,
        "num_classes": config.num_classes,
        "class_names": config.class_names,
        "palette": config.palette,
        "segmenter_fast_version": importlib.metadata.version("segmenter-fast"),
    }
    return {name: json.dumps(value) for name, value in facts.items()}


def _check(model: Segmenter, task: _Task, run: Run, batch: int) -> int:
    """Compares a program with the model on one batch; the number of pixels that rounding labels otherwise.

    Upsampling is a convex combination of masks, so that what the masks' error is bounds the logits' error, too.
    """
    pixels = _pixels(batch, task.size)
    device = next(model.parameters()).device
    images = torch.cat([normalise(image.numpy(), model.config.mean, model.config.std, device) for image in pixels])
    result = run(pixels.permute(0, 3, 1, 2).contiguous() if task.uint8 else images.cpu())

    exact = _masks(model, images, torch.float64)
    error = (_masks(model, images, task.dtype) - exact).abs().max()
    tolerance = float(4 * error + 2**-16 * exact.abs().max())
    if not tolerance < float("inf"):
        raise ExportError(f"the model's masks are not finite in {task.dtype} on a random image; try another dtype")

    logits = result if task.output == "logits" else _upsample(result, task, model) if task.output == "masks" else None
    labels = (result if logits is None else logits.argmax(1)).long()
    own = model.segment(images).cpu().long()
    differing = int((labels != own).sum())
    worst = 0.0
    if logits is not None or differing:
        exact = _upsample(exact, task, model)  # (B, K, H, W) float64
        worst = float((exact.amax(1) - exact.gather(1, labels[:, None])[:, 0]).max()) / 2
    if logits is not None:
        worst = max(worst, float((logits - exact).abs().max()))
    if not worst <= tolerance:
        raise ExportError(
            f"the exported program is not the model: of {labels.numel():,} labels {differing:,} differ, and scores are "
            f"off by {worst:.2g} where rounding explains {tolerance:.2g}; nothing was written"
        )
    return differing


def _pixels(batch: int, size: Pair) -> Tensor:
    """``(B, H, W, 3)`` uint8: seeded random colours, smooth and so of many labels, under a little noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)
    noisy = smooth * 255 + 16 * torch.randn(smooth.shape, generator=generator)
    return noisy.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _masks(model: Segmenter, images: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, K, h, w)`` float64 masks that the model gives on the CPU when its weights have a dtype."""
    return copy.deepcopy(model).to("cpu", dtype).eval().masks(images.cpu()).double()


def _upsample(masks: Tensor, task: _Task, model: Segmenter) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, K, H, W)`` logits."""
    height, width = task.size
    patch = model.config.patch_size if model.config.upsample_to == "padded" else 1
    size = -(-height // patch) * patch, -(-width // patch) * patch
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)[..., :height, :width]
