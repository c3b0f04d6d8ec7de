"""The inference form of a Segmenter: low-precision weights, uint8 images, compiled, one CUDA graph per input shape."""

from __future__ import annotations

import contextlib
import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo.config
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .decoders import MaskTransformer
from .vit import VisionTransformer

if TYPE_CHECKING:
    from .segmenter import Segmenter

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Input shapes that keep a CUDA graph; the one used longest ago goes first.
_MAX_GRAPHS = 8
# Grids that keep their position embedding: a few hundred kilobytes each.
_MAX_STEMS = 64


class InferenceSegmenter(nn.Module):
    """A Segmenter made ready for inference by ``Segmenter.optimize``; it cannot be trained.

    Takes ``(B, 3, H, W)`` images on the model's device: floating point and normalised, as the Segmenter takes them, or
    uint8 RGB, whose normalisation is folded into the patch embedding. The Segmenter it was made from is not changed.

    Precision: weights and activations have the dtype asked for. Softmax, norm statistics and accumulators are float32
    inside the ops, and so are the class scores and their LayerNorm: labels are decided by small differences of them.

    It may be copied, pickled, moved with ``.to`` and loaded into; what was derived from the weights, compiled or
    captured is then made again at the next call. ``state_dict`` has the Segmenter's keys.
    """

    def __init__(self, model: Segmenter, dtype: torch.dtype, compile: bool, cuda_graph: bool) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        self.config = model.config
        self.encoder = copy.deepcopy(model.encoder)
        self.decoder = copy.deepcopy(model.decoder)
        self.compile_graph = compile
        self.cuda_graph = cuda_graph
        self.to(dtype)
        self.requires_grad_(False)
        self.train(False)

    def masks(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, K, h, w)`` scores of the patches (channels-last strides)."""
        return self._run("masks", images)

    def segment(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, H, W)`` labels, uint8 up to 256 classes and int32 above."""
        return self._run("labels", images)

    def probabilities(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, K, H, W)`` class probabilities."""
        return self._run("probabilities", images)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, K, H, W)`` logits."""
        return self._run("logits", images)

    def loss(self, *arguments: Any, **options: Any) -> Tensor:
        """Refused: the weights are frozen, in low precision.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("an optimized model cannot be trained; call loss on the model it was made from")

    def train(self, mode: bool = True) -> InferenceSegmenter:
        """Stays in evaluation mode, whatever ``mode`` says."""
        return super().train(False)

    def reset(self) -> None:
        """Forget what was derived from the weights; it is made again at the next call."""
        self._stems: dict[Any, _Stem] = {}
        self._compiled: dict[tuple[str, torch.dtype], Callable[..., Tensor]] = {}
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        """As any module's, and what was derived from the old weights is forgotten."""
        loaded = super().load_state_dict(state_dict, *arguments, **options)
        self.reset()
        return loaded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceSegmenter:
        super()._apply(fn, recurse)
        if isinstance(self.decoder, MaskTransformer):
            self.decoder.mask_norm.float()
        self.reset()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for derived in ("_stems", "_compiled", "_graphs"):
            del state[derived]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.reset()

    @torch.no_grad()
    def _run(self, result: str, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 1:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images must be uint8, or floating point and normalised, got {images.dtype}")
        patch = self.config.patch_size
        rows, columns = (-(-side // patch) for side in images.shape[2:])
        key = (rows, columns, images.dtype == torch.uint8)
        if key not in self._stems:
            if len(self._stems) == _MAX_STEMS:
                self._stems.clear()
            self._stems[key] = _Stem.make(self.encoder, *key)
        stem = self._stems[key]
        compute = self._function(result, images.dtype)
        with self._compiler_settings():
            if not (self.cuda_graph and images.is_cuda and images.numel()):
                return compute(result, images, *stem.tensors())
            return self._replay(compute, result, images, stem)

    def _function(self, result: str, dtype: torch.dtype) -> Callable[..., Tensor]:
        """``_compute``, compiled for one kind of call if that is wanted."""
        if not self.compile_graph:
            return self._compute
        if (result, dtype) not in self._compiled:
            # A code object of its own: the compiler counts recompilations by it, and other models' must not add up.
            code = InferenceSegmenter._compute.__code__.replace()
            own = types.FunctionType(code, globals(), "_compute")
            self._compiled[result, dtype] = torch.compile(types.MethodType(own, self), fullgraph=True)
        return self._compiled[result, dtype]

    @contextlib.contextmanager
    def _compiler_settings(self) -> Iterator[None]:
        """Room for many image sizes; on a CPU, leave to pack the weights for its matrix products: they are frozen."""
        if not self.compile_graph:
            yield
            return
        freezing = next(self.parameters()).device.type == "cpu"
        with torch._dynamo.config.patch(recompile_limit=64), torch._inductor.config.patch(freezing=freezing):
            yield

    def _replay(self, compute: Callable[..., Tensor], result: str, images: Tensor, stem: _Stem) -> Tensor:
        graph_key = (result, images.shape, images.dtype)
        if graph_key not in self._graphs:
            if len(self._graphs) == _MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[graph_key] = _Graph.capture(lambda still: compute(result, still, *stem.tensors()), images)
        self._graphs.move_to_end(graph_key)
        return self._graphs[graph_key].replay(images)

    def _compute(
        self,
        result: str,
        images: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        prefix: Tensor,
        positions: Tensor | None,
        rotation: Tensor | None,
    ) -> Tensor:
        """The whole model as one function of tensors: what is compiled and captured."""
        patch = self.config.patch_size
        height, width = images.shape[2:]
        grid = -(-height // patch), -(-width // patch)
        padded = grid[0] * patch, grid[1] * patch
        images = images.to(weight.dtype)
        if shift is not None:
            images = images - shift
        if padded != (height, width):
            images = F.pad(images, (0, padded[1] - width, 0, padded[0] - height))
        patches = F.conv2d(images, weight, bias, stride=patch).flatten(2).mT  # (B, h w, D)
        if positions is not None:
            patches = patches + positions
        x = torch.cat([prefix.expand(images.shape[0], -1, -1), patches], 1)
        for block in self.encoder.blocks:
            x = block(x, rotation)
        masks = self.decoder(self.encoder.patches(x)).mT.unflatten(2, grid)
        size = padded if self.config.upsample_to == "padded" else (height, width)
        if result == "labels":
            return kernels.upsample_argmax(masks, size, (height, width))
        if result == "probabilities":
            return kernels.upsample_softmax(masks, size, (height, width))
        if result == "logits":
            logits = F.interpolate(masks.contiguous(), size=size, mode="bilinear", align_corners=False)
            return logits[..., :height, :width]
        return masks


@dataclass(frozen=True)
class _Stem:
    """What the patch embedding and the positions come to for one grid and kind of image.

    For uint8 images the standard deviation is folded into the weights. Of the mean, its value in the model's dtype is
    subtracted from the pixels, which is exact, so that zero padding stays the mean; the rest is folded into the bias.
    """

    weight: Tensor  # (D, 3, P, P)
    bias: Tensor  # (D,)
    shift: Tensor | None  # (1, 3, 1, 1)
    prefix: Tensor  # (1, prefix, D), positions added
    positions: Tensor | None  # (1, rows * columns, D)
    rotation: Tensor | None  # (2, prefix + rows * columns, D / heads)

    @classmethod
    def make(cls, encoder: VisionTransformer, rows: int, columns: int, from_bytes: bool) -> _Stem:
        config, projection = encoder.config, encoder.patch_embed.proj
        positions = encoder.positions(rows, columns)
        empty = projection.weight.new_empty(1, 0, config.embed_dim)
        prefix = torch.cat([empty, *encoder.prefix_tokens()], 1)
        if positions is not None and config.pos_embed_prefix:
            prefix = prefix + positions[:, : config.num_prefix_tokens]
            positions = positions[:, config.num_prefix_tokens :]
        weight, bias, shift = projection.weight, projection.bias, None
        assert bias is not None
        if from_bytes:
            mean, std = (
                255 * weight.new_tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (config.mean, config.std)
            )
            shift = mean.to(weight.dtype)
            folded = (weight.float() / std).to(weight.dtype)
            rest = (folded.float() * (mean - shift.float())).sum((1, 2, 3))
            weight, bias = folded, (bias.float() - rest).to(bias.dtype)
        return cls(weight, bias, shift, prefix, positions, encoder.rotation(rows, columns))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
        return self.weight, self.bias, self.shift, self.prefix, self.positions, self.rotation


@dataclass(frozen=True)
class _Graph:
    """A captured CUDA graph with the buffers it reads and writes."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    result: Tensor

    @classmethod
    def capture(cls, function: Callable[[Tensor], Tensor], images: Tensor) -> _Graph:
        still = images.clone()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, tunes and fills the allocator before anything is captured
                function(still)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(still)
        return cls(graph, still, result)

    def replay(self, images: Tensor) -> Tensor:
        self.images.copy_(images)
        self.graph.replay()
        return self.result.clone()
