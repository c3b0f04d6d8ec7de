"""Public names, signatures, commands and file formats are those that ``golden/contract.json`` lists.

A deliberate change is written there by ``python tests/test_contract.py`` and shows in the diff.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import typer
from typer.testing import CliRunner

import segmenter_fast as sf
from segmenter_fast import kernels
from segmenter_fast.cli import app

CONTRACT = Path(__file__).parent / "golden" / "contract.json"
TRAIN = "--preset folder --variant seg_m_mask_8 --epochs 1 --lr 1e-3 --resize 32 --crop 32 --window 32 --stride 32"


def public_names() -> dict[str, Any]:
    """Names of the package and of the kernels, and how each function is called."""
    found: dict[str, Any] = {"segmenter_fast": sorted(sf.__all__), "kernels": sorted(kernels.__all__)}
    functions = {f"sf.{name}": getattr(sf, name) for name in sf.__all__}
    functions |= {f"kernels.{name}": getattr(kernels, name) for name in kernels.__all__}
    functions |= {f"reference.{name}": getattr(kernels.reference, name, None) for name in kernels.__all__}
    functions["sf.inference.slide"] = sf.inference.slide
    for name in (
        "forward",
        "masks",
        "segment",
        "probabilities",
        "loss",
        "optimize",
        "attention_maps",
        "freeze_encoder",
    ):
        functions[f"sf.Segmenter.{name}"] = getattr(sf.Segmenter, name)
    for name, function in functions.items():
        if inspect.isfunction(function):
            found[name] = str(inspect.signature(function))
    found["SegmenterConfig"] = list(sf.SegmenterConfig.__dataclass_fields__)
    found["VARIANTS"] = list(sf.VARIANTS)
    return found


def op_schemas() -> list[str]:
    """Schemas of the public operators; those of their gradients are nobody's business."""
    names = [name for name in kernels.__all__ if name != "reference"]
    return [str(getattr(torch.ops.segmenter_fast, name).default._schema) for name in names]


def commands() -> dict[str, Any]:
    """Each command's arguments and options, with choices and defaults."""
    found = {}

    def visit(command: Any, path: str) -> None:
        for name, child in getattr(command, "commands", {}).items():
            visit(child, f"{path} {name}".strip())
        for parameter in command.params:
            kind = parameter.type_descriptor.annotation
            kind = list(get_args(kind)) if get_origin(kind) is Literal else str(kind)
            option = " ".join(sorted([*parameter.opts, *parameter.secondary_opts]))
            found[f"{path} {option}"] = [kind, "required" if parameter.required else str(parameter.default)]

    visit(typer.main.get_command(app), "")
    return found


def files(folder: Path) -> list[str]:
    """Names below a folder, numbers and dates in them left out."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted({"events" if "tfevents" in name else name for name in names})


def formats(folder: Path) -> dict[str, Any]:
    """Files and keys of a checkpoint, of a run of training and of predictions."""
    model = sf.create_model("seg_m_mask_8", num_classes=3, image_size=32).eval()
    model.save_pretrained(folder / "model")
    found: dict[str, Any] = {
        "checkpoint": files(folder / "model"),
        "config.json": sorted(json.loads((folder / "model" / "config.json").read_text())),
        "state_dict": sorted(name for name in model.state_dict() if ".blocks.1." not in name),
    }

    def run(*arguments: str) -> None:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output

    data, out = str(folder / "data"), folder / "run"
    run("dataset", "make", data, "--images", "6", "--size", "32")
    options = ["--workers", "0", "--batch-size", "2", "--pictures", "1"]
    run("train", "--data", data, "--out", str(out), *TRAIN.split(), *options)
    found["data"] = sorted({str(Path(name).parent / Path(name).suffix) for name in files(folder / "data")})
    found["run"] = files(out)
    for name in ("run.json", "scores.json"):
        for path in sorted(out.rglob(name)):
            found[f"run/{path.relative_to(out)}"] = sorted(json.loads(path.read_text()))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found["run/log.jsonl"] = sorted({" ".join(sorted(row)) for row in rows})
    run("predict", f"{data}/images/val", "--model", str(folder / "model"), "--out", str(folder / "out"))
    found["predictions"] = sorted({str(Path(name).parent / Path(name).suffix) for name in files(folder / "out")})
    return found


def contract(folder: Path) -> dict[str, Any]:
    return {"names": public_names(), "ops": op_schemas(), "commands": commands(), "formats": formats(folder)}


@pytest.mark.parametrize("part", ["names", "ops", "commands", "formats"])
def test_the_contract_holds(part: str, tmp_path: Path) -> None:
    wanted = json.loads(CONTRACT.read_text())[part]
    build = {"names": public_names, "ops": op_schemas, "commands": commands, "formats": lambda: formats(tmp_path)}
    found = json.loads(json.dumps(build[part]()))
    if isinstance(wanted, dict):
        for key in wanted.keys() | found.keys():
            assert found.get(key) == wanted.get(key), key
    assert found == wanted


if __name__ == "__main__":
    import tempfile

    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    with tempfile.TemporaryDirectory() as name:
        CONTRACT.write_text(json.dumps(contract(Path(name)), indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"wrote {CONTRACT}\n")
