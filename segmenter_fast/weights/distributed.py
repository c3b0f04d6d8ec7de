"""Folders of ``torch.distributed.checkpoint``: ``.metadata`` and ``*.distcp`` files, of any number of processes.

PyTorch's reader unpickles ``.metadata`` without restriction. Here every name in it is a record, which executes nothing.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .pickles import names_in
from .reading import CheckpointError, read_pickled, require_stored
from .unwrap import find_state

METADATA = ".metadata"


class _Record:
    """An object of the metadata: its pickled state, or its arguments."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.state = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):  # in C, a memo of few bytes may take gigabytes
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return tuple if (module, name) == ("torch", "Size") else type(name, (_Record,), {})


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Return the state dict of the model in a folder, see ``find_state``.

    Only the tensors of the model are read. Sizes are compared with the files before memory is taken.

    Raises:
        CheckpointError: damaged, incomplete, or no model in it.
        OSError: a file cannot be read.
    """
    pickled = (folder / METADATA).read_bytes()
    size = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    try:
        names_in(io.BytesIO(pickled))
        metadata = _Unpickler(io.BytesIO(pickled)).load().state
        sizes: dict[str, Tensor] = {}
        for key, entry in metadata["state_dict_metadata"].items():
            if entry.state and "properties" in entry.state:
                dtype = entry.state["properties"].state[0]
                sizes[key] = torch.empty(entry.state["size"], dtype=dtype, device="meta")
        places: dict[str, list[tuple[Any, Any]]] = {}
        for index, info in metadata["storage_data"].items():
            places.setdefault(index.state["fqn"], []).append((index.state.get("offset"), info.state))
        state, _ = find_state(sizes, str(folder))
        require_stored(state, size, str(folder))
        keys = {id(tensor): key for key, tensor in sizes.items()}
        return {name: _read(folder, tensor, places[keys[id(tensor)]]) for name, tensor in state.items()}
    except (OSError, CheckpointError):
        raise
    except Exception as error:  # of a metadata that is anything
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"{folder / METADATA} is damaged or of no known form ({reason})") from error


def _read(folder: Path, like: Tensor, chunks: list[tuple[Any, Any]]) -> Tensor:
    """Return a tensor of the size and dtype of ``like`` from the chunks that cover it."""
    whole, filled = torch.zeros_like(like, device="cpu"), 0
    for offsets, place in chunks:
        path = folder / Path(place["relative_path"]).name
        with path.open("rb") as file:
            file.seek(place["offset"])
            data = file.read(place["length"])
        chunk = read_pickled(io.BytesIO(data), len(data), str(path))
        part = whole[tuple(slice(start, start + side) for start, side in zip(offsets, chunk.shape, strict=True))]
        if part.shape != chunk.shape or chunk.dtype != like.dtype:
            raise CheckpointError(f"{path} has a chunk {tuple(chunk.shape)} at {offsets} of {tuple(like.shape)}")
        part.copy_(chunk)
        filled += chunk.numel()
    if filled != whole.numel():
        raise CheckpointError(f"{folder} has {filled} of {whole.numel()} values of a tensor: is a file missing?")
    return whole
