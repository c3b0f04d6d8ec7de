"""Exported files, run as users run them, give the model's results."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor

import segmenter_fast as sf
from segmenter_fast import export as module
from segmenter_fast import exportable, kernels
from segmenter_fast.export import ExportableSegmenter, ExportError, export
from support.models import FAMILIES, SMALL, normalised


def small(family: str) -> sf.Segmenter:
    """Encoder and decoder of one layer each, with weights so large that every one has an effect."""
    torch.manual_seed(0)
    name, fields = FAMILIES[family]
    model = sf.create_model(name, **{**SMALL, **fields, "depth": 1, "decoder_depth": 1}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def photographs(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(batch, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["images"]
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Family, options of export, batch size of the run.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "mask": ("mask_16", {"size": (40, 56)}, 1),
    "linear, dynamic, uint8": ("linear_16", {"batch_size": None, "uint8": True, "size": (33, 48)}, 5),
    "mmseg, logits": ("mmseg", {"output": "logits", "size": (40, 64)}, 1),
    "registers, masks": ("registers", {"output": "masks", "size": (40, 56), "batch_size": 2}, 2),
    "deit, dynamic": ("deit_mask", {"batch_size": None}, 1),
    "rotary": ("dinov3", {"size": (40, 56)}, 1),
    "float16, uint8": ("mask_16", {"dtype": torch.float16, "uint8": True}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_onnx_gives_what_the_model_gives(case: str, tmp_path: Path) -> None:
    family, options, batch = CASES[case]
    model, path = small(family), tmp_path / "model.onnx"
    found = export(model, path, **options)
    assert files(tmp_path) == ["model.onnx"]
    height, width = size = options.get("size", model.config.image_size)
    assert found.pixels == height * width * (options.get("batch_size", 1) or 3)

    pixels = photographs(batch, *size)
    images = normalised(model, pixels)
    result = run_onnx(path, pixels if options.get("uint8") else images)
    if options.get("output", "labels") == "labels":
        expected = model.segment(images)
        assert result.dtype == expected.dtype
        assert (result == expected).float().mean() >= (0.99 if "dtype" in options else 0.9999)
        assert len(expected.unique()) > 1
    else:
        with torch.inference_mode():
            expected = model(images) if options["output"] == "logits" else model.masks(images)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_onnx_has_standard_operators_and_metadata(tmp_path: Path) -> None:
    model, path = small("deit_mask"), tmp_path / "model.onnx"
    export(model, path, batch_size=None, uint8=True, size=(48, 32))
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert {node.domain for node in file.graph.node} <= {""}
    assert not file.functions
    assert not any("head" in tensor.name and "decoder" not in tensor.name for tensor in file.graph.initializer)
    batch, *sides = file.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch"
    assert [side.dim_value for side in sides] == [3, 48, 32]
    assert file.graph.output[0].name == "labels"
    facts = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    assert facts["variant"] == model.config.variant
    assert facts["image_size"] == [48, 32]
    assert facts["input"] == "uint8 RGB"
    assert facts["mean"] == list(model.config.mean)
    assert facts["num_classes"] == 5


def test_pt2_gives_what_the_model_gives(tmp_path: Path) -> None:
    model, path = small("mask_16"), tmp_path / "model.pt2"
    found = export(model, path, batch_size=None, uint8=True, size=(40, 56))
    assert files(tmp_path) == ["model.pt2"]
    assert found.pixels == 3 * 40 * 56
    package = torch._inductor.aoti_load_package(str(path))
    for batch in (1, 4):
        pixels = photographs(batch, 40, 56)
        result, expected = package(pixels), model.segment(normalised(model, pixels))
        assert result.dtype == torch.uint8
        assert (result == expected).float().mean() >= 0.9999
    facts = package.get_metadata()
    assert json.loads(facts["image_size"]) == [40, 56]
    assert json.loads(facts["std"]) == list(model.config.std)


def test_pt2_merges_tokens_as_the_model_does(tmp_path: Path) -> None:
    model = small("linear_16").with_merging(sf.TokenMerging((0,), 0.3))
    with inductor.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # half the time
        export(model, path := tmp_path / "model.pt2", batch_size=2, size=(64, 80))
    images = normalised(model, photographs(2, 64, 80))
    result, expected = torch._inductor.aoti_load_package(str(path))(images), model.segment(images)
    assert torch.equal(result, expected)
    assert not torch.equal(expected, model.with_merging(None).segment(images))


@pytest.mark.parametrize("share", [0.3, 0.0])
@pytest.mark.parametrize("family", ["mask_16", "dinov3"])
def test_onnx_merges_tokens_as_the_model_does(family: str, share: float, tmp_path: Path) -> None:
    model = small(family).with_merging(sf.TokenMerging((0,), share, channels=5))
    export(model, path := tmp_path / "model.onnx", batch_size=None, size=(64, 80), output="masks")
    images = normalised(model, photographs(4, 64, 80))
    with torch.inference_mode():
        expected, exact = model.masks(images), model.with_merging(None).masks(images)
    torch.testing.assert_close(run_onnx(path, images), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(expected, exact) == (share == 0)


@pytest.mark.parametrize(("tokens", "prefix"), [(12, 0), (13, 2), (40, 1)])
def test_sources_merge_without_a_sort_as_with_one(tokens: int, prefix: int) -> None:
    generator, sources = torch.Generator().manual_seed(0), tokens // 2
    pool = torch.tensor([0.0, -0.0, 0.5, 0.5, -1.0, 0.25, torch.inf, -torch.inf, 1e-45, -3.0])
    value = pool[torch.randint(len(pool), (50, sources), generator=generator)]  # many are equal
    value[:5, ::2] = torch.nan
    match = torch.randint(tokens - sources, (50, sources), generator=generator)
    for merged in range(1, sources + 1 if prefix else sources // 2):
        expected = kernels.reference.bipartite_groups(value[5:], match[5:], tokens, merged, prefix)
        assert torch.equal(exportable._bipartite_groups(value, match, tokens, merged, prefix)[5:], expected)
    without_nan = exportable._bipartite_groups(value[:5], match[:5], tokens, 1, prefix)
    assert torch.equal(without_nan, kernels.reference.bipartite_groups(value[:5], match[:5], tokens, 1, prefix))


def test_the_model_is_unchanged(tmp_path: Path) -> None:
    model = small("deit_mask").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    export(model, tmp_path / "model.onnx", size=(48, 32), dtype=torch.float16)
    assert all(part.training for part in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


@pytest.mark.parametrize("output", ["labels", "logits"])
def test_a_wrong_file_is_not_kept(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ExportableSegmenter.forward
    monkeypatch.setattr(ExportableSegmenter, "forward", lambda module, images: right(module, images.flip(-1)))
    path = tmp_path / "model.onnx"
    path.write_text("of yesterday")
    with pytest.raises(ExportError, match="the exported file does not give the model's results: of 1,024 labels"):
        export(small("mask_16"), path, output=output)
    assert files(tmp_path) == ["model.onnx"]
    assert path.read_text() == "of yesterday"


def test_wrong_scores_with_the_right_labels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ExportableSegmenter.forward
    monkeypatch.setattr(ExportableSegmenter, "forward", lambda module, images: right(module, images) + 0.01)
    with pytest.raises(ExportError, match=r"of 1,024 labels 0 differ, and scores are off by 0\.01 where"):
        export(small("mask_16"), tmp_path / "model.onnx", output="masks")
    assert files(tmp_path) == []


@torch.no_grad()
def test_only_labels_of_ties_may_differ(tmp_path: Path) -> None:
    model = small("linear_16")
    with torch.no_grad():
        for parameter in (model.decoder.head.weight, model.decoder.head.bias):
            parameter[3] = parameter[1]  # classes 1 and 3 have equal scores
    options = module._Options(tmp_path / "model.onnx", (32, 32), 2, "labels", False, torch.float32)
    images = []

    def relabelled(old: int, new: int) -> module.Run:
        def run(batch: Tensor) -> Tensor:
            labels = model.segment(batch)
            images.append(labels)
            return torch.where(labels == old, new, labels)

        return run

    differing = module._check(model, options, relabelled(1, 3), 2)
    assert differing == (images[0] == 1).sum() > 0
    with pytest.raises(ExportError, match="does not give the model's results"):
        module._check(model, options, relabelled(1, 0), 2)


def test_a_model_that_overflows_in_the_dtype_is_refused(tmp_path: Path) -> None:
    model = small("linear_16")
    with torch.no_grad():
        model.decoder.head.bias += 1e6
    with pytest.raises(ExportError, match=r"not finite in torch\.float16"):
        export(model, tmp_path / "model.onnx", dtype=torch.float16)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.pth", {}, r"must end in \.onnx or \.pt2, got .*model\.pth"),
        ("model", {}, r"must end in \.onnx or \.pt2"),
        ("model.onnx", {"size": (0, 32)}, r"size must be \(height, width\), each at least 1, got \(0, 32\)"),
        ("model.onnx", {"batch_size": 0}, "batch_size must be at least 1, or None for any, got 0"),
        ("model.onnx", {"output": "overlay"}, "output must be one of labels, masks, logits, got 'overlay'"),
        ("model.pt2", {"dtype": torch.float64}, r"dtype must be one of float32, bfloat16, float16, got torch\.float64"),
        ("model.onnx", {"dtype": torch.bfloat16}, "ONNX files have float32 or float16 weights"),
        ("folder.onnx", {}, "is a folder; name a file"),
        ("nowhere/model.onnx", {}, "nowhere must be an existing folder, to write model.onnx into"),
        ("file/model.onnx", {}, "file must be an existing folder, to write model.onnx into"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, OSError), match=message):
        export(small("mask_16"), tmp_path / name, **options)
    assert files(tmp_path) == ["file", "folder.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"need {package}: pip install 'segmenter-fast\[export\]'"):
        export(small("mask_16"), tmp_path / "model.onnx")


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(ExportError, match=r"\.pt2 packages need a working C\+\+ compiler"):
        export(small("linear_16"), tmp_path / "model.pt2")
    assert files(tmp_path) == []


def test_a_missing_gpu_toolkit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def package(*_: object, **__: object) -> None:
        raise OSError("CUDA_HOME environment variable is not set")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    with pytest.raises(ExportError, match=r"need a working C\+\+ compiler.*CUDA_HOME environment variable is not set"):
        export(small("linear_16"), tmp_path / "model.pt2")
    assert files(tmp_path) == []


def test_files_are_checked_without_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, seen = (torch.backends.cuda.matmul, torch.backends.cudnn.conv), []

    def write(model: sf.Segmenter, *_: object) -> object:
        def run(images: torch.Tensor) -> torch.Tensor:
            seen.extend(setting.fp32_precision for setting in settings)
            return model.segment(images)

        return run

    monkeypatch.setattr("segmenter_fast.export._write_pt2", write)
    before = [setting.fp32_precision for setting in settings]
    with contextlib.suppress(OSError):  # nothing was written
        export(small("linear_16"), tmp_path / "model.pt2")
    assert seen == ["ieee"] * 2
    assert [setting.fp32_precision for setting in settings] == before
