"""Segmenter (Strudel et al., ICCV 2021) with fused kernels, for inference and training."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# In a checkout that is not installed, the parts `kernels`, `train` and `benchmarks` lie beside this folder.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "kernels")):
    __path__.append(os.path.dirname(os.path.dirname(__file__)))

# Imported here, because the package `accelerate` would later take the function's place. None of it imports PyTorch.
from .accelerate import AccelerationReport, accelerate, acceleration_report, made_full_size, restore
from .config import VARIANTS, SegmenterConfig
from .token_merging import TokenMerging
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import inference
    from .inference.predict import Prediction, predict
    from .segmenter import Segmenter
    from .weights.load import create_model, load

__all__ = [
    "VARIANTS",
    "AccelerationReport",
    "Prediction",
    "Segmenter",
    "SegmenterConfig",
    "TokenMerging",
    "accelerate",
    "acceleration_report",
    "create_model",
    "inference",
    "load",
    "made_full_size",
    "predict",
    "restore",
]

# Names that need PyTorch, which takes seconds to import: module of each, imported when the name is first used.
_LATER = {
    "Prediction": "inference.predict",
    "Segmenter": "segmenter",
    "create_model": "weights.load",
    "load": "weights.load",
    "predict": "inference.predict",
}

if not TYPE_CHECKING:  # for a type checker every name would exist

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module of this package, at its first use."""
        module = f"{__name__}.{_LATER.get(name, name)}"
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise  # something that the module needs is missing
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        return globals().setdefault(name, getattr(found, name) if name in _LATER else found)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
