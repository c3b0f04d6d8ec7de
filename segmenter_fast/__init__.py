"""Segmenter (Strudel et al., ICCV 2021) with fused kernels, for inference and training."""

from . import inference
from .accelerate import AccelerationReport, accelerate, acceleration_report, restore
from .config import VARIANTS, SegmenterConfig
from .inference.predict import Prediction, predict
from .segmenter import Segmenter
from .weights.load import create_model, load

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "AccelerationReport",
    "Prediction",
    "Segmenter",
    "SegmenterConfig",
    "accelerate",
    "acceleration_report",
    "create_model",
    "inference",
    "load",
    "predict",
    "restore",
]
