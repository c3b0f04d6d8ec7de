"""Saving and loading in our own format, through huggingface_hub's mixin. Local folders need no network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download

from ..io.atomic import atomic_files
from ..numerics import program_of
from . import ours
from .build import build

if TYPE_CHECKING:
    from ..config import SegmenterConfig

_CARD = "README.md"
# Of the backbones that variants start from, as timm states them, by a part of their name; the first that fits.
_LICENCES = (("dinov3", "the DINOv3 License"), ("", "Apache 2.0"))


class HubMixin(
    PyTorchModelHubMixin,
    library_name="segmenter-fast",
    pipeline_tag="image-segmentation",
    tags=["segmenter", "semantic-segmentation", "vision-transformer"],
    paper_url="https://arxiv.org/abs/2105.05633",
):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` for a module with a ``SegmenterConfig``.

    ``from_pretrained`` takes any configuration field to override, as ``segmenter_fast.load`` does.
    """

    config: SegmenterConfig

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``model.safetensors``, ``config.json`` and, where there is none, a model card.

        A save that fails half-way leaves an earlier checkpoint as it was. ``config`` is ignored: the model's own
        describes its weights.

        Returns:
            The address of the commit with ``push_to_hub=True``, otherwise None.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(save_directory)
        with atomic_files(folder) as temporary:
            super().save_pretrained(temporary, model_card_kwargs=model_card_kwargs)
            if (folder / _CARD).exists():
                (temporary / _CARD).unlink()
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)
        return None

    def generate_model_card(self, *_: Any, **card_data: Any) -> ModelCard:
        """A model card with variant, classes, numerics and licence of the weights.

        ``card_data`` adds to its metadata, such as ``license``, the licence of these weights. Nobody but their owner
        can know it: where it is not given, the card says so, and what the backbone is licensed under.
        """
        config = self.config
        metadata = ModelCardData(**self._hub_mixin_info.model_card_data.to_dict() | card_data)
        rows = {
            "variant": config.variant,
            "licence of the weights": _licence(config, card_data.get("license")),
            "classes": f"{config.num_classes}" + (f": {', '.join(config.class_names)}" if config.class_names else ""),
            "numerics of": program_of(config),
            "encoder": f"width {config.embed_dim}, {config.depth} layers, {config.num_heads} heads",
            "decoder": config.decoder,
            "image size, patch size": f"{config.image_size[0]} x {config.image_size[1]}, {config.patch_size}",
            "window, stride": f"{config.window_size}, {config.window_stride}",
            "mean, std": f"{config.mean}, {config.std}",
            "LayerNorm eps, encoder and decoder": f"{config.encoder_norm_eps}, {config.decoder_norm_eps}",
            "position embedding": f"{config.pos_embed_kind}, resized {config.pos_embed_mode}"
            if config.pos_embed_kind == "learned"
            else config.pos_embed_kind,
            "masks upsampled to": config.upsample_to,
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        return ModelCard(
            f"---\n{metadata.to_yaml()}\n---\n\n# {config.variant}\n\n"
            f"A [Segmenter]({self._hub_mixin_info.paper_url}) for semantic segmentation.\n\n"
            f"| | |\n|---|---|\n{table}\n\n"
            "```python\nimport segmenter_fast as sf\n\n"
            'model = sf.load("this folder, or its id on the hub")\n'
            'labels = sf.predict(model, "photograph.jpg").labels\n```\n'
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        ours.write_folder(save_directory, self.config, self.state_dict())  # type: ignore[attr-defined]

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: Any = None, **options: Any) -> Any:
        """Called by ``from_pretrained``; ``config`` is its raw reading of config.json, which is read again, checked."""
        hub_names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        hub_options = {name: options.pop(name) for name in hub_names if name in options}
        folder = Path(model_id)
        if not folder.is_dir():
            for name in (ours.CONFIG, ours.WEIGHTS):
                folder = Path(hf_hub_download(model_id, name, **hub_options)).parent
        return build(cls, dataclasses.replace(ours.read_folder(folder), name=model_id), options)  # type: ignore[type-var]


def _licence(config: SegmenterConfig, given: str | None) -> str:
    if given:
        return given
    if config.timm_backbone is None:
        return "not stated"
    name = next(name for part, name in _LICENCES if part in config.timm_backbone)
    return f"not stated; if they started from {config.timm_backbone}: that is under {name}"
