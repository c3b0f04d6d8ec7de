"""The notebooks run from the first cell to the last, and are committed without outputs; the script runs, too."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import timm
import torch
from jupyter_client.manager import AsyncKernelManager
from PIL import Image

from support.predict import photo

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


class Kernel(AsyncKernelManager):
    """The kernel of this interpreter, whatever kernels are registered on the machine."""

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        return [sys.executable, "-m", "ipykernel_launcher", "-f", self.connection_file, *(extra_arguments or [])]


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"swap_in", "train_on_your_own_data"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs"), f"{path.name} is committed with outputs: clear them"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_manager_class=Kernel, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    print(printed)
    assert printed


def test_classes_are_found_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()  # random weights
    torch.save(backbone, tmp_path / "backbone.pth")
    photos = [photo(tmp_path / name) for name in ("a.png", "b.png")]
    monkeypatch.setattr(sys, "argv", ["", *map(str, photos), "--out", str(tmp_path / "out.png"), "--classes", "3"])
    sys.argv += ["--pretrained", str(tmp_path / "backbone.pth")]
    runpy.run_path(str(FOLDER / "classes_without_labels.py"), run_name="__main__")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (2 * 518, 2 * 518)
        above, below = (np.asarray(picture.crop((0, top, 518, top + 518))) for top in (0, 518))
    assert (above != below).any()


def test_centres_are_those_of_separate_groups() -> None:
    centres_of = runpy.run_path(str(FOLDER / "classes_without_labels.py"))["centres_of"]
    groups = torch.eye(4)[:3]
    features = groups.repeat_interleave(20, 0) * torch.linspace(1, 5, 60)[:, None] + 0.01 * torch.randn(60, 4)
    centres = centres_of(features, 3)
    assert ((centres @ groups.mT).amax(0) > 0.999).all()
