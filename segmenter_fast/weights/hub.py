"""Our own format, in folders and on the Hugging Face Hub: ``model.safetensors``, ``config.json`` and a model card.

``config.json`` holds the fields of ``SegmenterConfig``, class names and palette among them, and the versions of the
format and of the package that wrote it. Local folders need no network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import SegmenterConfig
from ..describe import describe_config
from ..io.atomic import atomic_files
from ..version import __version__
from . import huggingface
from .build import SavedModel, build
from .reading import CheckpointError, read_mapping, read_safetensors
from .unwrap import read_state

FORMAT_VERSION = 1
WEIGHTS, CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
INDEX = "model.safetensors.index.json"  # names the files of weights that are sharded
PICKLED = "pytorch_model.bin"  # of older models of Hugging Face's
_DOWNLOAD_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
# Licences that timm states for backbones, by a part of their names; the first that fits.
_LICENCES = (("dinov3", "the DINOv3 License"), ("", "Apache 2.0"))


def read_folder(folder: Path) -> SavedModel:
    """Return the model that ``write_folder`` wrote, or a backbone that transformers' ``save_pretrained`` wrote.

    Raises:
        FileNotFoundError: one of the two files is missing.
        CheckpointError: one of them is damaged, of another library or of a newer format.
    """
    path = folder / CONFIG
    fields = read_mapping(path)
    if "model_type" in fields:
        return huggingface.read_backbone(str(folder), _read_weights(folder), fields, folder)
    version, writer = fields.pop("format_version", None), fields.pop("package_version", "unknown")
    if not isinstance(version, int):
        raise CheckpointError(f"{path}: no configuration of segmenter-fast: it has no format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {version}, written by segmenter-fast {writer}; this one reads {FORMAT_VERSION}"
        )
    config = config_of(path, fields, f" (written by segmenter-fast {str(writer)[:40]})")
    return SavedModel(str(folder), config, _read_weights(folder))


def weights_path(folder: Path) -> Path:
    """Return the file of a folder with the weights, or with the names of their files."""
    return next((folder / name for name in (WEIGHTS, INDEX, PICKLED) if (folder / name).exists()), folder / WEIGHTS)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = weights_path(folder)
    return read_state(path)[0] if path.name == PICKLED else read_safetensors(path)


def config_of(path: Path, fields: Any, origin: str = "") -> SegmenterConfig:
    """Return the configuration that a file holds.

    Raises:
        CheckpointError: a field that is unknown, of another type or out of range.
    """
    try:
        return SegmenterConfig.from_dict(fields)
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {str(error)[:1000]}{origin}") from error


def read_hub(model_id: str, **options: Any) -> SavedModel:
    """Return the model of an id on the Hugging Face Hub, from the local cache or the network, see ``read_folder``.

    Args:
        options: of ``hf_hub_download``.

    Raises:
        OSError, HfHubHTTPError: it cannot be fetched.
    """
    folder = Path(hf_hub_download(model_id, CONFIG, **options)).parent
    optional = [huggingface.PIXELS] if "model_type" in read_mapping(folder / CONFIG) else []
    try:
        hf_hub_download(model_id, WEIGHTS, **options)
    except EntryNotFoundError:
        if not optional:
            raise
        hf_hub_download(model_id, PICKLED, **options)
    for name in optional:
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(model_id, name, **options)
    return dataclasses.replace(read_folder(folder), name=model_id)


def write_folder(folder: Path, config: SegmenterConfig, state: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder.

    Raises:
        OSError: a file cannot be written.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # raised for a full disk
        raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from error
    versions = {"format_version": FORMAT_VERSION, "package_version": __version__}
    (folder / CONFIG).write_text(json.dumps(versions | config.to_dict(), indent=2) + "\n", encoding="utf-8")


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
        """Return a model card with architecture, numerics, classes and the licence of the weights.

        Args:
            card_data: entries to add to its metadata, such as ``license``. Only the owner of the weights knows their
                licence: without one the card says that it is not stated, and names that of the backbone.
        """
        config = self.config
        metadata = ModelCardData(**self._hub_mixin_info.model_card_data.to_dict() | card_data)
        licence = card_data.get("license") or "not stated"
        if not card_data.get("license") and config.timm_backbone:
            name = next(name for part, name in _LICENCES if part in config.timm_backbone)
            licence += f"; if they started from {config.timm_backbone}: that is under {name}"
        rows = {"licence of the weights": licence, **describe_config(config)}
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
        write_folder(save_directory, self.config, self.state_dict())  # type: ignore[attr-defined]

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: Any = None, **options: Any) -> Any:
        """Load for ``from_pretrained``, whose unchecked ``config`` is ignored."""
        download = {name: options.pop(name) for name in _DOWNLOAD_OPTIONS if name in options}
        folder = Path(model_id)
        saved = read_folder(folder) if folder.is_dir() else read_hub(model_id, **download)
        return build(cls, saved, options)  # type: ignore[type-var]
