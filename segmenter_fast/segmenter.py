"""The model: encoder, decoder, and the upsample ops that keep the full-size logits from ever existing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .attention_maps import attention_maps
from .config import SegmenterConfig
from .decoders import LinearDecoder, MaskTransformer
from .optimize import InferenceSegmenter
from .vit import VisionTransformer
from .weights.hub import HubMixin


class Segmenter(nn.Module, HubMixin):
    """Segmenter with the official program's state-dict keys and forward contract.

    All methods take ``(B, 3, H, W)`` floating point images, RGB, normalised with the configuration's mean and std, of
    any height and width: they are zero-padded at the bottom and right to whole patches. Images are cast to the dtype
    of the weights.

    Source: Strudel et al., ICCV 2021. As in the official program, and unlike the paper's text, the LayerNorm over
    classes acts on the patch-level masks, before the upsampling.

    Raises (all methods):
        ValueError, TypeError: images of a wrong rank, channel count or dtype, naming what was given.
    """

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VisionTransformer(config)
        self.decoder = (MaskTransformer if config.decoder == "mask" else LinearDecoder)(config)
        self.apply(_initialise)

    def padded(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images, checked, in the dtype of the weights, zero-padded to whole patches."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 1:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point and normalised, got {images.dtype}; "
                "segmenter_fast.predict takes uint8 images"
            )
        images = images.to(self.encoder.patch_embed.proj.weight.dtype)
        patch = self.config.patch_size
        height, width = images.shape[2:]
        if height % patch or width % patch:
            images = F.pad(images, (0, -width % patch, 0, -height % patch))
        return images

    def masks(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, K, h, w)`` scores of the patches of the padded images (channels-last strides)."""
        images, patch = self.padded(images), self.config.patch_size
        scores = self.decoder(self.encoder(images))  # (B, h w, K)
        return scores.mT.unflatten(2, (images.shape[2] // patch, images.shape[3] // patch))

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, K, H, W)`` logits. Everything else here avoids this tensor."""
        masks = self.masks(images).contiguous()  # interpolate copies the full-size result of channels-last masks
        height, width = images.shape[2:]
        logits = F.interpolate(masks, size=self._upsampled_size(images), mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def segment(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, H, W)`` labels, uint8 up to 256 classes and int32 above; not differentiable."""
        return kernels.upsample_argmax(self.masks(images), self._upsampled_size(images), images.shape[2:])

    def probabilities(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, K, H, W)`` class probabilities."""
        return kernels.upsample_softmax(self.masks(images), self._upsampled_size(images), images.shape[2:])

    def loss(
        self,
        images: Tensor,
        target: Tensor,
        ignore_index: int = 255,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """Mean cross-entropy of ``(B, 3, H, W)`` images against ``(B, H, W)`` class indices: a float32 scalar.

        ``weight`` is ``(K,)``; the options mean what they mean in ``torch.nn.functional.cross_entropy``.
        """
        if target.shape != (images.shape[0], *images.shape[2:]):
            wanted = (images.shape[0], *images.shape[2:])
            raise ValueError(f"target must be {wanted} for images {tuple(images.shape)}, got {tuple(target.shape)}")
        return kernels.upsample_cross_entropy(
            self.masks(images),
            target,
            self._upsampled_size(images),
            ignore_index=ignore_index,
            weight=weight,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )

    def freeze_encoder(self, frozen: bool = True) -> Segmenter:
        """Train the decoder only, on features of an encoder that stays as it is; ``frozen=False`` undoes it.

        Encoder parameters lose their ``requires_grad``, ``train`` leaves the encoder in evaluation mode, and nothing of
        it is kept for a backward pass, so that no gradient reaches the images either. Not part of a saved model.

        Returns:
            The model itself.
        """
        self.encoder.freeze(frozen)
        return self.train(self.training)

    def optimize(
        self, dtype: torch.dtype = torch.bfloat16, compile: bool = True, cuda_graph: bool = True
    ) -> InferenceSegmenter:
        """The inference form of this model, which is left as it is; see ``InferenceSegmenter``.

        Args:
            dtype: of weights and activations: bfloat16, float16 or float32.
            compile: whether ``torch.compile`` fuses what lies between the ops. The first call of a shape then takes a
                minute or so, later calls of another batch size or image size once more.
            cuda_graph: on a GPU, capture one CUDA graph per input shape, for the last 8 shapes, each with its own
                memory; nothing elsewhere.

        Raises:
            ValueError: another dtype.
        """
        return InferenceSegmenter(self, dtype, compile, cuda_graph)

    def attention_maps(self, images: Tensor, layer: int, part: str = "encoder", queries: slice | None = None) -> Tensor:
        """Attention probabilities of one layer; see ``segmenter_fast.attention_maps.attention_maps``."""
        return attention_maps(self, images, layer, part, queries)

    def _upsampled_size(self, images: Tensor) -> list[int]:
        """What the masks are upsampled to before the crop to the image."""
        patch = self.config.patch_size if self.config.upsample_to == "padded" else 1
        return [-(-side // patch) * patch for side in images.shape[2:]]


def _initialise(module: nn.Module) -> None:
    """The official program's random initialisation: truncated normals of 0.02, projections of unit gain."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, VisionTransformer):
        for parameter in (*module.prefix_tokens(), module.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
    elif isinstance(module, MaskTransformer):
        nn.init.trunc_normal_(module.cls_emb, std=0.02)
        for projection in (module.proj_patch, module.proj_classes):
            nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
