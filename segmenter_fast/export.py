"""A model as a file that runs without this package: ONNX (.onnx) or an AOTInductor package (.pt2).

Every file is run and compared with the model before it appears under its name.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .config import Pair
from .decoders import upsampled_size
from .devices import DTYPES
from .exportable import ExportableSegmenter
from .io.atomic import atomic_path
from .io.images import normalise
from .segmenter import Segmenter
from .version import __version__

_OUTPUTS = ("labels", "masks", "logits")
_ONNX_BYTES = 2**31 - 2**24  # of one protobuf message, less some room for the graph
# Batch sizes of a file for any batch size: it is traced with the first and checked with the others.
_DYNAMIC_BATCHES = (3, 1, 2)

Run = Callable[[Tensor], Tensor]


class ExportError(ValueError):
    """A package or compiler that the export needs is missing, or the exported file does not give the model's labels."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and the result of its check."""

    path: Path
    pixels: int
    """Pixels whose labels were compared with the model's own."""
    differing: int
    """Pixels with another label than the model's, every one a tie within rounding."""


@dataclass(frozen=True)
class _Options:
    """The arguments of ``export``, checked."""

    path: Path
    size: Pair
    batch_size: int | None
    output: str
    uint8: bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.path.suffix not in (".onnx", ".pt2"):
            raise ValueError(f"file to export to must end in .onnx or .pt2, got {self.path}")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be (height, width), each at least 1, got {self.size}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or None for any, got {self.batch_size}")
        if self.output not in _OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(_OUTPUTS)}, got {self.output!r}")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.path.suffix == ".onnx":
            if self.dtype == torch.bfloat16:
                raise ValueError("ONNX files have float32 or float16 weights: onnxruntime has no bfloat16 on a CPU")
            missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
            if missing:
                raise ExportError(f"ONNX files need {', '.join(missing)}: pip install 'segmenter-fast[export]'")
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder; name a file")
        if not self.path.parent.is_dir():
            raise NotADirectoryError(f"{self.path.parent} must be an existing folder, to write {self.path.name} into")


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
    """Write a model for images of one size, and check that the file gives the model's labels.

    The file's one input is ``images``: ``(B, C, H, W)``, float32 and normalised, or uint8. Its one output has the
    name of ``output``: "labels" ``(B, H, W)``, uint8 up to 256 classes and int32 above; "masks" ``(B, K, h, w)``
    float32 scores of the patches; "logits" ``(B, K, H, W)`` float32. A .pt2 package runs on the model's kind of device.
    ``metadata_props`` of the ONNX file and ``get_metadata()`` of the package hold class names, mean, std etc. in JSON.

    The check runs the file on seeded random images. A label may differ from the model's only if, in float64, the scores
    of the two classes are within four times the error of the model itself in ``dtype``.

    Args:
        model: left unchanged.
        path: the file, ending in .onnx or .pt2; an existing one is replaced, or kept if anything fails.
        size: (height, width) of the images, by default the configuration's ``image_size``.
        batch_size: images at once; None for any number.
        uint8: take uint8 images and normalise them inside.
        dtype: of weights and activations; bfloat16 for .pt2 only.

    Raises:
        ValueError: an argument outside its range.
        ExportError: a package or the C++ compiler is missing, or the check failed.
        OSError: the file cannot be written.
    """
    if model.config.adaptive:
        raise ValueError(
            "a model that merges tokens by a threshold has no fixed sizes to export; give it shares, or load it with "
            "merge='none'"
        )
    height, width = model.config.image_size if size is None else size
    options = _Options(Path(path), (height, width), batch_size, output, uint8, dtype)
    model = copy.deepcopy(model).eval()
    with atomic_path(options.path) as written, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's exporters use deprecated parts of PyTorch
        run = (_write_onnx if options.path.suffix == ".onnx" else _write_pt2)(model, options, written)
        batches = _DYNAMIC_BATCHES[1:] if batch_size is None else (batch_size,)
        differing = sum(_check(model, options, run, batch) for batch in batches)
    return Exported(options.path, sum(batches) * height * width, differing)


def _write_onnx(model: Segmenter, options: _Options, path: Path) -> Run:
    """Write one self-contained file, and return it as a function in onnxruntime."""
    import onnxruntime

    traced = _trace(model, options, torch.device("cpu"))
    if sum(tensor.nbytes for tensor in traced.state_dict.values()) > _ONNX_BYTES:
        raise ValueError("the weights are over 2 GiB, more than an ONNX file holds; try float16 or .pt2")
    written = torch.onnx.export(
        traced,
        input_names=["images"],
        output_names=[options.output],
        dynamic_shapes=_dynamic_shapes(options),  # for the name of the axis
        external_data=False,
        verbose=False,
    )
    assert written is not None
    written.model.metadata_props.update(_metadata(model, options))
    written.save(path)
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, session_options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_pt2(model: Segmenter, options: _Options, path: Path) -> Run:
    """Compile and package for the model's device, and return the package as a function."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    device = next(model.parameters()).device
    traced, metadata = _trace(model, options, device), _metadata(model, options)
    needed = "a working C++ compiler, such as g++"
    if device.type == "cuda":
        needed += ", and for a GPU its toolkit: headers and libraries of CUDA (CUDA_HOME) or ROCm (ROCM_HOME)"
    try:
        aoti_compile_and_package(traced, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata})
    except (InductorError, CppCompileError, OSError) as error:  # OSError: no toolkit
        inner = error.inner_exception if isinstance(error, InductorError) else error
        if not isinstance(inner, (InvalidCxxCompiler, CppCompileError, OSError)):
            raise
        raise ExportError(f".pt2 packages need {needed} ({error})") from error
    package = aoti_load_package(str(path))
    return lambda images: package(images.to(device)).cpu()


def _trace(model: Segmenter, options: _Options, device: torch.device) -> torch.export.ExportedProgram:
    module = ExportableSegmenter(model, options.size, options.output, options.uint8, options.dtype).to(device)
    batch, dtype = options.batch_size or _DYNAMIC_BATCHES[0], torch.uint8 if options.uint8 else torch.float32
    images = torch.zeros(batch, model.config.in_channels, *options.size, dtype=dtype, device=device)
    # With strict=False the tracer takes len(images) for a constant.
    return torch.export.export(module, (images,), dynamic_shapes=_dynamic_shapes(options), strict=True)


def _dynamic_shapes(options: _Options) -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("batch", min=1)} if options.batch_size is None else None}


def _metadata(model: Segmenter, options: _Options) -> dict[str, str]:
    """Facts for the users of the file, as JSON values."""
    pixels = " RGB" if model.config.in_channels == 3 else ""
    facts: dict[str, Any] = {
        "image_size": options.size,
        "input": f"uint8{pixels}" if options.uint8 else f"float32{pixels} in [0, 1], minus mean, divided by std",
        "output": options.output,
        "dtype": str(options.dtype).removeprefix("torch."),
        "segmenter_fast_version": __version__,
    }
    for name in ("variant", "in_channels", "mean", "std", "num_classes", "class_names", "palette"):
        facts[name] = getattr(model.config, name)
    return {name: json.dumps(fact) for name, fact in facts.items()}


def _check(model: Segmenter, options: _Options, run: Run, batch: int) -> int:
    """Compare a file with the model on one batch; return the number of pixels with another label, all of them ties."""
    pixels = _pixels(batch, model.config.in_channels, options.size)
    device, upsampled = next(model.parameters()).device, upsampled_size(model.config, options.size)
    images = torch.cat([normalise(image.numpy(), model.config.mean, model.config.std, device) for image in pixels])
    with _without_tf32():  # the tolerance comes from the CPU, which has none
        result = run(pixels.permute(0, 3, 1, 2).contiguous() if options.uint8 else images.cpu())

    exact = _masks(model, images, torch.float64)
    # Upsampling is a convex combination of masks: their error bounds the error of the logits.
    error = (_masks(model, images, options.dtype) - exact).abs().max()
    tolerance = float(4 * error + 2**-16 * exact.abs().max())
    if not tolerance < float("inf"):
        raise ExportError(f"the model's masks are not finite in {options.dtype} on a random image; try another dtype")

    if options.output == "masks":
        result = kernels.reference.upsample(result, upsampled, options.size, align_corners=False)
    scores = options.output != "labels"
    labels = (result.argmax(1) if scores else result).long()
    differing = int((labels != model.segment(images).cpu()).sum())
    worst = 0.0
    if scores or differing:
        exact = kernels.reference.upsample(exact, upsampled, options.size, align_corners=False)  # (B, K, H, W) float64
        worst = float((exact.amax(1) - exact.gather(1, labels[:, None])[:, 0]).max()) / 2
    if scores:
        worst = max(worst, float((result - exact).abs().max()))
    if not worst <= tolerance:
        raise ExportError(
            f"the exported file does not give the model's results: of {labels.numel():,} labels {differing:,} differ, "
            f"and scores are off by {worst:.2g} where rounding explains {tolerance:.2g}; nothing was written"
        )
    return differing


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Products and convolutions of float32 in full precision inside the block."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def _pixels(batch: int, channels: int, size: Pair) -> Tensor:
    """``(B, H, W, C)`` uint8: seeded random colours, smooth, so that many labels occur, under a little noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, channels, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)
    noisy = smooth * 255 + 16 * torch.randn(smooth.shape, generator=generator)
    return noisy.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _masks(model: Segmenter, images: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, K, h, w)`` float64 masks of the model with weights of a dtype, on the CPU."""
    return copy.deepcopy(model).to("cpu", dtype).eval().masks(images.cpu()).double()
