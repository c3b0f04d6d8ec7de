"""Make a CUDA build of torchvision importable beside a CPU build of torch; the Makefile runs this after pip.

Package registries serve torchvision as a CUDA build, whose compiled operators do not load without CUDA. Then ``import
torchvision``, and with it ``import timm``, fails, because torchvision adds fake kernels to two operators that nothing
has declared. This script appends their schemas to ``torchvision/extension.py``. The operators themselves stay unusable;
the transforms, which this project uses, are plain PyTorch. An installation that imports is left as it is.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

DECLARATIONS = """

if not _has_ops():  # added by segmenter-fast's installation: _meta_registrations needs the schemas of these two
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def imports() -> bool:
    """Return True if a fresh interpreter can import torchvision."""
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


def main() -> None:
    """Raises SystemExit where torchvision is missing or cannot be imported afterwards either."""
    if imports():
        return
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        raise SystemExit("torchvision is not installed: pip install 'segmenter-fast[train]'")
    extension = Path(package.origin).with_name("extension.py")
    text = extension.read_text(encoding="utf-8")
    if DECLARATIONS not in text:
        beside = extension.with_suffix(".py.new")
        beside.write_text(text + DECLARATIONS, encoding="utf-8")
        beside.replace(extension)
    if not imports():
        raise SystemExit(f"torchvision cannot be imported, see: {sys.executable} -c 'import torchvision'")


if __name__ == "__main__":
    main()
