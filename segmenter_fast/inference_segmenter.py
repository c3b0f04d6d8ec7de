"""The inference form of a Segmenter: low-precision weights, uint8 images, compiled, replayed by CUDA graphs."""

from __future__ import annotations

import contextlib
import copy
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import SegmenterConfig
from .decoders import LinearDecoder, MaskTransformer, upsampled
from .devices import choose_compile, choose_dtype, computes_slowly, keep_freed_memory, numeric_state, warn_of_slow_dtype
from .graphs import Graphs
from .linears import pack_linears, store_linears, unpack
from .merging import Scores, run_blocks, sharing
from .patches import check_images, pad_to_patches, project_patches
from .quantize import check_quantization, quantize_linears, warn_of_slow_quantization
from .token_merging import Merge, TokenMerging
from .vit import VisionTransformer

# Grids that keep their position embedding: a few hundred kilobytes each.
_MAX_STEMS = 64
# Kinds of calls that are known to be compiled: a few hundred bytes each.
_MAX_COMPILED = 4096

# Weight, bias and shift of the patch embedding; prefix tokens, positions and rotation of the grid. See ``_stem``.
_Stem = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]


class InferenceSegmenter(nn.Module):
    """The inference form of a Segmenter, made by ``Segmenter.optimize``; it cannot be trained.

    Takes ``(B, C, H, W)`` images on the model's device: floating point and normalised, as the Segmenter takes them, or
    uint8, whose normalisation is folded into the patch embedding. Encoder and decoder are copied.

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
        if self.config.adaptive and compile is True:
            raise ValueError("compile must not be True with a threshold of token merging, which has no fixed sizes")
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
        elif device.type == "cpu" and (self.config.adaptive or not self.compile_graph):
            pack_linears(self)
        self.requires_grad_(False)
        self.train(False)

    def masks(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, K, h, w)`` scores of the patches (channels-last strides)."""
        return self._run("masks", images)

    def segment(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, H, W)`` labels, uint8 up to 256 classes and int32 above."""
        return self._run("labels", images)

    def probabilities(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, K, H, W)`` class probabilities."""
        return self._run("probabilities", images)

    def token_groups(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, h, w)`` int64: the group of patches that each patch is merged into, from 0 on."""
        return self._run("groups", images)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, K, H, W)`` logits."""
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
        self._renew()

    def _renew(self) -> None:
        self._stems: dict[tuple[int, int, bool], _Stem] = {}
        self._compiled: dict[tuple[str, torch.dtype], Callable[..., Any]] = {}
        self._called: set[Any] = set()
        self._graphs = Graphs()
        self._lock = threading.RLock()
        self._merged: dict[TokenMerging | None, InferenceSegmenter] = {}

    def with_merging(self, merge: Merge) -> InferenceSegmenter:
        """Return a model with these very weights and another merging of tokens, the same one at every call.

        Arguments and errors are those of ``Segmenter.with_merging``.
        """
        merging = TokenMerging.of(merge, self.config.depth)
        if merging == self.config.merging:
            return self
        with self._lock:
            if merging not in self._merged:
                other = sharing(self, config=self.config.replace(merging=merging))
                other._renew()
                self._merged[merging] = other
            return self._merged[merging]

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
        for derived in ("_stems", "_compiled", "_called", "_graphs", "_lock", "_merged"):
            del state[derived]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.reset()

    @torch.no_grad()
    def _run(self, result: str, images: Tensor) -> Tensor:
        check_images(images, uint8=True, channels=self.config.in_channels)
        stem = self._stem_of(images)
        if not self._captures(images):
            return self._call(result, images, stem)
        # The last op on a large result runs after the graph, which then leaves nothing large to be copied.
        scores = "scores" if result == "probabilities" and self.config.merging else "masks"
        captured = result if result in ("labels", "groups") else scores
        key = captured, images.shape, images.dtype, numeric_state(images.device.type)

        def upsample(found: Any) -> Tensor:
            masks, index = found if captured == "scores" else (found, None)
            return upsampled(result, masks, self.config, images.shape[2:], index)

        take = torch.clone if captured == result else upsample
        return self._graphs.run(key, lambda fixed: self._call(captured, fixed, stem), images, take)

    def _captures(self, images: Tensor) -> bool:
        return self.cuda_graph and not self.config.adaptive and images.is_cuda and images.numel() > 0

    def _stem_of(self, images: Tensor) -> _Stem:
        """The stem for the images' grid and kind, kept for the next ones."""
        patch = self.config.patch_size
        key = -(-images.shape[2] // patch), -(-images.shape[3] // patch), images.dtype == torch.uint8
        stem = self._stems.get(key)
        if stem is None:
            with self._lock:
                if len(self._stems) >= _MAX_STEMS:
                    self._stems.clear()
                keep_freed_memory()
                stem = self._stems[key] = self._stem(*key)
        return stem

    def _call(self, result: str, images: Tensor, stem: _Stem) -> Any:
        """``_compute``, compiled where that is asked for."""
        if self.config.adaptive or not self.compile_graph:
            return self._compute(result, images, *stem)
        function = self._function(result, images.dtype)
        # Everything that can make the compiler compile again. Its settings take longer than a small model's kernels.
        state = numeric_state(images.device.type), torch.is_inference_mode_enabled(), torch.get_num_threads()
        key = result, images.shape, images.stride(), images.dtype, state
        if key in self._called:
            return function(result, images, *stem)
        with self._lock, self._compiler_settings():
            computed = function(result, images, *stem)
            if len(self._called) >= _MAX_COMPILED:
                self._called.clear()
            self._called.add(key)
        return computed

    def _stem(self, rows: int, columns: int, from_uint8: bool) -> _Stem:
        """Weights of the patch embedding for a kind of image, and tokens and positions for a grid of patches.

        For uint8 images the standard deviation is folded into the weights. The mean, rounded to the model's dtype, is
        subtracted from the pixels, which is exact, so that zero padding equals the mean; the rest of the mean is folded
        into the bias.

        Returns:
            weight ``(D, C, P, P)``, bias ``(D,)``, shift ``(1, C, 1, 1)`` or None; then, of ``grid_embeddings``, prefix
            ``(1, prefix, D)``, positions ``(1, rows * columns, D)`` or None, rotation or None.
        """
        projection, shift = self.encoder.patch_embed.proj, None
        weight, bias = projection.weight, projection.bias
        assert bias is not None
        if from_uint8:
            mean, std = (
                255 * weight.new_tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
                for values in (self.config.mean, self.config.std)
            )
            shift = mean.to(weight.dtype)
            folded = (weight.float() / std).to(weight.dtype)
            rest = (folded.float() * (mean - shift.float())).sum((1, 2, 3))
            weight, bias = folded, (bias.float() - rest).to(bias.dtype)
        return weight, bias, shift, *self.encoder.grid_embeddings(rows, columns, self.config.merging)

    def _function(self, result: str, dtype: torch.dtype) -> Callable[..., Any]:
        """The compiled form of ``_compute`` for one result and dtype of images."""
        if (result, dtype) not in self._compiled:
            # The compiler counts recompilations per code object: a copy keeps other models' out of the count.
            code = InferenceSegmenter._compute.__code__.replace()
            own = types.FunctionType(code, globals(), "_compute")
            self._compiled[result, dtype] = torch.compile(types.MethodType(own, self), fullgraph=True)
        return self._compiled[result, dtype]

    @contextlib.contextmanager
    def _compiler_settings(self) -> Iterator[None]:
        """Allow many image sizes; on a CPU, let the compiler pack the frozen weights for its matrix products."""
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
    ) -> Any:
        """Compute a tensor, or masks and index for "scores", from tensors alone: what is compiled and captured."""
        images = images.to(weight.dtype)
        if shift is not None:
            images = images - shift
        patches = project_patches(pad_to_patches(images, self.config.patch_size), weight, bias)
        grid = patches.shape[2], patches.shape[3]
        patches = patches.flatten(2).mT  # (B, h w, D)
        if positions is not None:
            patches = patches + positions
        x = torch.cat([prefix.expand(images.shape[0], -1, -1), patches], 1)
        x, groups = run_blocks(self.encoder.blocks, x, rotation, grid, self.config.merging)
        features = self.encoder.norm(x)[:, prefix.shape[1] :]
        scores = Scores(self.decoder(features, None if groups is None else groups.bias), grid, groups)
        if result == "groups":
            return scores.index()
        masks, index = scores.maps(gather=result in ("masks", "logits"))
        if result in ("masks", "scores"):
            return masks if result == "masks" else (masks, index)
        return upsampled(result, masks, self.config, images.shape[2:], index)
