"""The inference form of a Segmenter: low-precision weights, uint8 images, compiled, one CUDA graph per input shape."""

from __future__ import annotations

import contextlib
import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .config import SegmenterConfig
from .decoders import LinearDecoder, MaskTransformer, upsampled_size
from .devices import choose_compile, choose_dtype, computes_slowly, warn_of_slow_dtype
from .linears import pack_linears, store_linears, unpack
from .quantize import check_quantization, quantize_linears, warn_of_slow_quantization
from .vit import VisionTransformer, channels_last_maps, check_images, pad_to_patches

# Input shapes that keep a CUDA graph; the least recently used is dropped first.
_MAX_GRAPHS = 8
# Grids that keep their position embedding: a few hundred kilobytes each.
_MAX_STEMS = 64

# Weight, bias and shift of the patch embedding; prefix tokens, positions and rotation of the grid. See ``_stem``.
_Stem = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]


class InferenceSegmenter(nn.Module):
    """The inference form of a Segmenter, made by ``Segmenter.optimize``; it cannot be trained.

    Takes ``(B, 3, H, W)`` images on the model's device: floating point and normalised, as the Segmenter takes them, or
    uint8 RGB, whose normalisation is folded into the patch embedding. Encoder and decoder are copied.

    Precision: weights and activations have the given dtype; on a CPU that is slow in it, the weights of linear layers
    do, and everything is computed in float32. ``Segmenter.optimize`` decides by the model's device. Softmax, norm
    statistics and accumulators are float32 inside the ops, and so are the class scores and their LayerNorm, because
    small differences of them decide labels. With ``quantize`` the linear layers of the blocks run in 8 bits, see
    ``QuantizedLinear``.

    On a CPU, linear layers keep a second copy of their weights, packed for oneDNN, unless it is compiled; and the C
    library is asked to keep up to 62 MB of freed memory, as returning it to the system after each image costs up to a
    quarter of the time (T/16, bfloat16).

    It may be copied, pickled, moved with ``.to`` and loaded into. The next call then derives, compiles and captures
    everything again. ``state_dict`` has the Segmenter's keys.
    """

    def __init__(
        self,
        config: SegmenterConfig,
        encoder: VisionTransformer,
        decoder: MaskTransformer | LinearDecoder,
        dtype: torch.dtype | str,
        compile: bool | str,
        cuda_graph: bool,
        quantize: str | None = None,
    ) -> None:
        super().__init__()
        device = next(encoder.parameters()).device
        if quantize is not None:
            check_quantization(quantize, device)
        dtype = choose_dtype(dtype, device, int8=quantize == "int8")
        stored_only = device.type == "cpu" and computes_slowly(dtype, device)
        self.config = config
        self.encoder = copy.deepcopy(encoder)
        self.decoder = copy.deepcopy(decoder)
        self.compile_graph = choose_compile(compile, device, dtype)
        self.cuda_graph = cuda_graph
        if quantize is not None:
            warn_of_slow_quantization(quantize, config.embed_dim, device.type)
            quantize_linears(self.encoder.blocks, quantize)
            if isinstance(self.decoder, MaskTransformer):
                quantize_linears(self.decoder.blocks, quantize)
        self.to(torch.float32 if stored_only else dtype)
        if stored_only:
            warn_of_slow_dtype(dtype, device)
            for part in (self.encoder.blocks, self.decoder):
                store_linears(part, dtype)
        elif device.type == "cpu" and not self.compile_graph:
            pack_linears(self)
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
        """Raise an error: the weights are frozen, in low precision.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("an optimized model cannot be trained; call loss on the model it was made from")

    def train(self, mode: bool = True) -> InferenceSegmenter:
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    def reset(self) -> None:
        """Drop everything derived from the weights; the next call makes it again."""
        unpack(self)
        self._stems: dict[tuple[int, int, bool], _Stem] = {}
        self._compiled: dict[tuple[str, torch.dtype], Callable[..., Tensor]] = {}
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        """Load, as every module does, and drop everything derived from the old weights."""
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
        check_images(images, uint8=True)
        rows, columns = (-(-side // self.config.patch_size) for side in images.shape[2:])
        key = (rows, columns, images.dtype == torch.uint8)
        if key not in self._stems:
            if len(self._stems) == _MAX_STEMS:
                self._stems.clear()
            _keep_freed_memory()
            self._stems[key] = self._stem(*key)
        stem = self._stems[key]
        compute = self._function(result, images.dtype)
        with self._compiler_settings():
            if not (self.cuda_graph and images.is_cuda and images.numel()):
                return compute(result, images, *stem)
            graph_key = (result, images.shape, images.dtype)
            if graph_key not in self._graphs:
                if len(self._graphs) == _MAX_GRAPHS:
                    self._graphs.popitem(last=False)
                self._graphs[graph_key] = _Graph.capture(lambda fixed: compute(result, fixed, *stem), images)
            self._graphs.move_to_end(graph_key)
            return self._graphs[graph_key].replay(images)

    def _stem(self, rows: int, columns: int, from_uint8: bool) -> _Stem:
        """Weights of the patch embedding for a kind of image, and tokens and positions for a grid of patches.

        For uint8 images the standard deviation is folded into the weights. The mean, rounded to the model's dtype, is
        subtracted from the pixels, which is exact, so that zero padding equals the mean; the rest of the mean is folded
        into the bias.

        Returns:
            weight ``(D, 3, P, P)``, bias ``(D,)``, shift ``(1, 3, 1, 1)`` or None; then, of ``grid_embeddings``, prefix
            ``(1, prefix, D)``, positions ``(1, rows * columns, D)`` or None, rotation or None.
        """
        projection, shift = self.encoder.patch_embed.proj, None
        weight, bias = projection.weight, projection.bias
        assert bias is not None
        if from_uint8:
            mean, std = (
                255 * weight.new_tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
                for values in (self.config.mean, self.config.std)
            )
            shift = mean.to(weight.dtype)
            folded = (weight.float() / std).to(weight.dtype)
            rest = (folded.float() * (mean - shift.float())).sum((1, 2, 3))
            weight, bias = folded, (bias.float() - rest).to(bias.dtype)
        return weight, bias, shift, *self.encoder.grid_embeddings(rows, columns)

    def _function(self, result: str, dtype: torch.dtype) -> Callable[..., Tensor]:
        """``_compute``, or with ``compile`` its compiled form for one result and dtype of images."""
        if not self.compile_graph:
            return self._compute
        if (result, dtype) not in self._compiled:
            # The compiler counts recompilations per code object: a copy keeps other models' out of the count.
            code = InferenceSegmenter._compute.__code__.replace()
            own = types.FunctionType(code, globals(), "_compute")
            self._compiled[result, dtype] = torch.compile(types.MethodType(own, self), fullgraph=True)
        return self._compiled[result, dtype]

    @contextlib.contextmanager
    def _compiler_settings(self) -> Iterator[None]:
        """Allow many image sizes; on a CPU, let the compiler pack the frozen weights for its matrix products."""
        if not self.compile_graph:
            yield
            return
        from torch._dynamo import config as dynamo  # a second to import
        from torch._inductor import config as inductor

        freezing = next(self.parameters()).device.type == "cpu"
        with dynamo.patch(recompile_limit=64), inductor.patch(freezing=freezing):
            yield

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
        """Compute one result from tensors alone: the function that is compiled and captured."""
        height, width = size = images.shape[2:]
        images = images.to(weight.dtype)
        if shift is not None:
            images = images - shift
        patches = F.conv2d(pad_to_patches(images, self.config.patch_size), weight, bias, stride=self.config.patch_size)
        grid = patches.shape[2:]
        patches = patches.flatten(2).mT  # (B, h w, D)
        if positions is not None:
            patches = patches + positions
        x = torch.cat([prefix.expand(images.shape[0], -1, -1), patches], 1)
        for block in self.encoder.blocks:
            x = block(x, rotation)
        masks = channels_last_maps(self.decoder(self.encoder.norm(x)[:, prefix.shape[1] :]), grid)
        if result == "masks":
            return masks
        upsampled = upsampled_size(self.config, size)
        if result == "labels":
            return kernels.upsample_argmax(masks, upsampled, size)
        if result == "probabilities":
            return kernels.upsample_softmax(masks, upsampled, size)
        return kernels.reference.upsample(masks, upsampled, (height, width), align_corners=False)


def _keep_freed_memory() -> None:
    """Let the C library reuse freed blocks below 31 MB: glibc takes the largest freed block as its threshold.

    Source: mallopt(3), M_MMAP_THRESHOLD. The memory is never touched.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


@dataclass(frozen=True)
class _Graph:
    """A captured CUDA graph with the buffers it reads and writes."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    result: Tensor

    @classmethod
    def capture(cls, function: Callable[[Tensor], Tensor], images: Tensor) -> _Graph:
        fixed = images.clone()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, tunes and fills the allocator before anything is captured
                function(fixed)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(fixed)
        return cls(graph, fixed, result)

    def replay(self, images: Tensor) -> Tensor:
        self.images.copy_(images)
        self.graph.replay()
        return self.result.clone()
