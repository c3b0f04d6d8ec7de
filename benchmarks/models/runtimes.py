"""Whole models in the programs that people run on a CPU instead of PyTorch: OpenVINO and ONNX Runtime.

Both get the peer (attention through SDPA, then logits and argmax in the graph), with fixed shapes and PyTorch's number
of threads, each on the faster of its roads: OpenVINO converts the module itself, whose attention it then fuses; ONNX
Runtime reads what ``torch.onnx.export`` makes of it.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from segmenter_fast.reference import ReferenceSegmenter

OPENVINO, ONNX_RUNTIME = "OpenVINO", "ONNX Runtime"
PACKAGES = {OPENVINO: ("openvino",), ONNX_RUNTIME: ("onnx", "onnxscript", "onnxruntime")}
# OpenVINO's own choice is bfloat16 wherever the CPU has it.
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_OPSET = 18


class _Labels(nn.Module):
    def __init__(self, model: ReferenceSegmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.segment(images)


def absence(runtime: str, device: torch.device) -> str | None:
    """The reason why a runtime cannot take part, or None."""
    if device.type != "cpu":
        return "for a CPU only"
    missing = [name for name in PACKAGES[runtime] if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(missing)}: pip install 'segmenter-fast[bench-peers]'" if missing else None


def make_call(runtime: str, model: ReferenceSegmenter, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The call from ``(B, 3, H, W)`` float32 ``images`` to ``(B, H, W)`` labels.

    ONNX Runtime computes in float32 whatever ``dtype`` is: on a CPU it has no bfloat16.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of sizes that become constants
        return (_openvino if runtime == OPENVINO else _onnx_runtime)(_Labels(model).eval(), images, dtype)


def _openvino(module: _Labels, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    converted = openvino.convert_model(module, example_input=images, input=list(images.shape))
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    array = images.numpy()

    def call() -> Tensor:
        outputs = request.infer([array], share_inputs=True, share_outputs=True)
        return torch.from_numpy(next(iter(outputs.values())))

    return call


def _onnx_runtime(module: _Labels, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    import onnxruntime

    program = torch.onnx.export(module, (images,), input_names=["images"], opset_version=_OPSET, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Its threads else turn idly after a call, beside the model that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])
