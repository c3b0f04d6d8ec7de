"""The model: encoder, decoder, and the upsample ops, which never build the full-size logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import kernels
from .config import SegmenterConfig
from .decoders import LinearDecoder, MaskTransformer, upsampled, upsampled_size
from .inference_segmenter import InferenceSegmenter
from .merging import Scores, sharing
from .patches import check_images
from .token_merging import Merge
from .vit import Block, VisionTransformer
from .weights.hub import HubMixin

# Largest number of attention scores of one chunk of queries, beside the result of ``attention_maps``.
_CHUNK_VALUES = 1 << 24


class Segmenter(nn.Module, HubMixin):
    """Segmenter with the official program's state-dict keys and forward contract.

    All methods take ``(B, C, H, W)`` floating point images, normalised with the configuration's mean and std, of any
    height and width. C is ``in_channels``, by default 3 for RGB. Images are cast to the dtype of the weights and
    zero-padded at the bottom and right to whole patches.

    Source: Strudel et al., ICCV 2021. As in the official program, and unlike the paper's text, the LayerNorm over
    classes acts on the patch-level masks, before the upsampling.

    Raises (all methods):
        ValueError, TypeError: images of a wrong rank, channel count or dtype.
    """

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VisionTransformer(config)
        self.decoder = (MaskTransformer if config.decoder == "mask" else LinearDecoder)(config)
        self.apply(_initialise)

    def masks(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, K, h, w)`` scores of the patches of the padded images (channels-last strides)."""
        return self._scores(images).maps(gather=True)[0]

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, K, H, W)`` logits. No other method builds this tensor."""
        return upsampled("logits", self.masks(images), self.config, images.shape[2:])

    def segment(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, H, W)`` labels, uint8 up to 256 classes and int32 above; not differentiable."""
        masks, index = self._scores(images).maps()
        return upsampled("labels", masks, self.config, images.shape[2:], index)

    def probabilities(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, K, H, W)`` class probabilities."""
        masks, index = self._scores(images).maps()
        return upsampled("probabilities", masks, self.config, images.shape[2:], index)

    def loss(
        self,
        images: Tensor,
        target: Tensor,
        ignore_index: int = 255,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """Mean cross-entropy of ``(B, C, H, W)`` images against ``(B, H, W)`` class indices: a float32 scalar.

        ``weight`` is ``(K,)``; the options are those of ``torch.nn.functional.cross_entropy``.
        """
        wanted = (images.shape[0], *images.shape[2:])
        if target.shape != wanted:
            raise ValueError(f"target must be {wanted} for images {tuple(images.shape)}, got {tuple(target.shape)}")
        masks, index = self._scores(images).maps()
        options = upsampled_size(self.config, images.shape[2:]), ignore_index, weight, label_smoothing, reduction
        return kernels.upsample_cross_entropy(masks, target, *options, index=index)

    def _scores(self, images: Tensor) -> Scores:
        check_images(images, channels=self.config.in_channels)
        grid = -(-images.shape[2] // self.config.patch_size), -(-images.shape[3] // self.config.patch_size)
        if self.encoder.merging is None:
            return Scores(self.decoder(self.encoder(images)), grid)
        features, groups = self.encoder.merged(images)
        return Scores(self.decoder(features, None if groups is None else groups.bias), grid, groups)

    def token_groups(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, h, w)`` int64: the group of patches that each patch is merged into, from 0 on."""
        return self._scores(images).index()

    def freeze_encoder(self, frozen: bool = True) -> Segmenter:
        """Train the decoder only, on features of an unchanging encoder; ``frozen=False`` undoes it.

        Encoder parameters lose their ``requires_grad``, ``train`` leaves the encoder in evaluation mode, and nothing of
        it is kept for a backward pass, so no gradient reaches the images either. Not part of a saved model.

        Returns:
            The model itself.
        """
        self.encoder.freeze(frozen)
        return self.train(self.training)

    def optimize(
        self,
        dtype: torch.dtype | str = "auto",
        compile: bool | str = "auto",
        cuda_graph: bool = True,
        quantize: str | None = None,
        merge: Merge = None,
    ) -> InferenceSegmenter:
        """Return the inference form of this model, a copy; see ``InferenceSegmenter``.

        Args:
            dtype: of weights and activations: bfloat16, float16 or float32, or a name of them. "auto" is bfloat16 if
                the hardware multiplies it fast, else float16 on a GPU and float32 elsewhere; see
                ``devices.choose_dtype``. A CPU that is slow in the given dtype keeps the weights of linear layers in
                it, for their memory, computes in float32, and warns once.
            compile: run ``torch.compile`` on everything between the ops. The first call of a shape then takes a minute
                or so; another batch size or image size compiles once more. "auto" compiles where it wins; see
                ``devices.choose_compile``.
            cuda_graph: on a GPU, capture one CUDA graph per input shape, for the last 8 shapes, each with its own
                memory. No effect on other devices.
            quantize: run the linear layers of the blocks in 8 bits, weights with a scale for each output channel and
                activations with one for each token; the rest keeps ``dtype``. "int8" warns where it was measured to
                gain nothing over bfloat16. "fp8" needs an NVIDIA GPU of the Hopper generation or newer; no GPU has
                measured it. ``segmenter-fast check`` counts the labels that change on your own images.
            merge: merging of tokens that are alike, approximate: "fast", "faster" or a ``TokenMerging``; "none" for
                exact. By default the configuration's. With a threshold nothing is compiled or captured.

        Raises:
            ValueError: another dtype, ``compile``, ``quantize`` or ``merge``, or one that the device does not have.
        """
        config = self.config if merge is None else self.config.replace(merging=merge)
        return InferenceSegmenter(config, self.encoder, self.decoder, dtype, compile, cuda_graph, quantize)

    def with_merging(self, merge: Merge) -> Segmenter:
        """Return a model with these very weights, not copies, and another merging of tokens.

        Args:
            merge: "fast", "faster" or a ``TokenMerging``; "none" or None for exact.

        Raises:
            ValueError: an unknown name, or a layer that does not exist.
        """
        config = self.config.replace(merging=merge)
        return sharing(self, config=config, encoder=sharing(self.encoder, config=config, merging=config.merging))

    @torch.no_grad()
    def attention_maps(self, images: Tensor, layer: int, part: str = "encoder", queries: slice | None = None) -> Tensor:
        """Softmax probabilities of every head of one layer, in the model's mode (train or eval), by plain PyTorch.

        The layers before run as in ``forward``, with the fused attention.

        Args:
            images: ``(B, C, H, W)``, as in ``forward``.
            layer: index into the layers of ``part``; negative ones count from the end.
            part: "encoder", whose tokens are the prefix tokens and the patches in row-major order, or "decoder" (mask
                transformer only), whose tokens are the patches and the class embeddings.
            queries: the tokens whose rows are returned, by default all. All rows of a large image take
                B x heads x N x N x 4 bytes: 0.8 GB for one 512 x 512 image of a ViT-B at patch size 8.

        Returns:
            ``(B, heads, queries, N)`` float32 (float64 for a float64 model); each row sums to 1.

        Raises:
            ValueError: another part, a layer that does not exist, the decoder of a model with a linear one, or a model
                that merges tokens.
        """
        if self.encoder.merging is not None:
            raise ValueError(
                "this model merges patches, attention maps are between patches: with_merging(None) has them"
            )
        if part not in ("encoder", "decoder"):
            raise ValueError(f"part must be 'encoder' or 'decoder', got {part!r}")
        stack = self.encoder if part == "encoder" else self.decoder
        if isinstance(stack, LinearDecoder):
            raise ValueError("part 'decoder' needs a mask transformer; the linear decoder has no attention")
        blocks = stack.blocks
        if not -len(blocks) <= layer < len(blocks):
            raise ValueError(f"layer must be in [{-len(blocks)}, {len(blocks)}) for the {part}, got {layer}")
        if isinstance(stack, MaskTransformer):
            x, rotation = stack.proj_dec(self.encoder(images)), None
            x = torch.cat([x, stack.cls_emb.expand(x.shape[0], -1, -1)], 1)
        else:
            x, rotation = stack.embed(images)
        for block in blocks[: layer % len(blocks)]:
            x = block(x, rotation)
        block = blocks[layer]
        assert isinstance(block, Block)
        q, k, _ = block.attn.packed_qkv(block.norm1(x), rotation).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads)
        q = q[:, :, queries or slice(None)] * q.shape[-1] ** -0.5
        maps = q.new_empty((*q.shape[:3], k.shape[2]), dtype=q.dtype if q.dtype == torch.float64 else torch.float32)
        chunk = max(_CHUNK_VALUES // max(maps[:, :, :1].numel(), 1), 1)
        for rows, into in zip(q.split(chunk, 2), maps.split(chunk, 2), strict=True):
            torch.softmax((rows @ k.mT).to(maps.dtype), -1, out=into)
        return maps


def _initialise(module: nn.Module) -> None:
    """The official program's random initialisation: truncated normals of 0.02, projections of unit gain."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, VisionTransformer):
        for parameter in (module.cls_token, module.dist_token, module.reg_token, module.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
    elif isinstance(module, MaskTransformer):
        nn.init.trunc_normal_(module.cls_emb, std=0.02)
        for projection in (module.proj_patch, module.proj_classes):
            nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
