"""Checkpoints from any format into one that others read, and onto the Hugging Face Hub."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

from ..segmenter import Segmenter
from . import official, official_export, ours

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class CheckpointFormat(str, Enum):
    """``ours``: config.json and model.safetensors. ``official``: variant.yml and checkpoint.pth."""

    ours = "ours"
    official = "official"


_FILES = {
    CheckpointFormat.ours: (ours.CONFIG, ours.WEIGHTS),
    CheckpointFormat.official: (official.VARIANT, official.WEIGHTS),
}


def write(model: Segmenter, folder: Path, to: CheckpointFormat) -> list[str]:
    """Writes a model into a folder; an earlier checkpoint of the same format is replaced.

    Returns:
        What gets lost or will be computed otherwise there, one sentence each.

    Raises:
        ValueError: the official program cannot run the model, or the folder holds a checkpoint of the other format,
            which would be read instead of this one or beside it.
        OSError: the folder cannot be written.
    """
    for other, names in _FILES.items():
        if other != to and (found := [name for name in names if (folder / name).exists()]):
            raise ValueError(f"{folder} holds another checkpoint ({', '.join(found)}); choose a folder without one")
    if to is CheckpointFormat.official:
        return official_export.write_folder(folder, model.config, model.state_dict())
    model.save_pretrained(folder)
    return []


def push(model: Segmenter, repository: str, private: bool = False, licence: str | None = None) -> str:
    """Uploads a model and its card to the Hugging Face Hub, as the user that is logged in there.

    Args:
        repository: ``org/name``; made where it does not exist.
        private: whether a new repository is private.
        licence: of the weights, an identifier that the Hub knows, such as ``"mit"``.

    Returns:
        The address of the commit.

    Raises:
        ValueError: a repository that is no ``org/name``.
        OSError: it cannot be pushed, saying why.
    """
    if not _HUB_ID.fullmatch(repository):
        raise ValueError(f"repository must be org/name, got {repository!r}")
    card = {"license": licence} if licence else {}
    try:
        return str(model.push_to_hub(repository, private=private, model_card_kwargs=card))
    except Exception as error:  # network, login and permission raise classes of several libraries
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise OSError(f"{repository} cannot be pushed to the Hugging Face Hub: {reason}") from error
