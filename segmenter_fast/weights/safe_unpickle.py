"""Reads the tensors of a checkpoint that also pickles objects of other packages.

mmengine's training checkpoints pickle ``HistoryBuffer`` objects with numpy arrays, which ``weights_only=True`` refuses.
Here an unpickler is given nothing but the inert classes below: whatever name the file asks for, none is imported,
and whatever the file calls, one of these classes is called. Names of the packages that such checkpoints are known to
hold become placeholders; any other name, ``os.system`` for one, refuses the file.

Every exposed class swallows its pickled state, because unpickling would otherwise set attributes on it: a file could
then change a class or function for the rest of the program. Tensors stay descriptions until the unpickler is gone.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOREIGN_PACKAGES = ("mmengine", "mmcv", "mmseg", "numpy")
_FOREIGN_NAMES = frozenset(
    {
        ("_codecs", "encode"),  # how protocol 2 writes bytes
        ("__builtin__", "getattr"),  # how protocol 2 writes HistoryBuffer.min
        ("builtins", "getattr"),
        ("__builtin__", "set"),
        ("builtins", "set"),
        ("collections", "defaultdict"),
        ("torch", "Size"),
        ("torch", "device"),
    }
)
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Opcodes that reach objects by other ways than find_class and persistent_load, or that torch.save never writes.
_REFUSED_OPCODES = frozenset(
    {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER", "BYTEARRAY8"}
)


class RefusedError(Exception):
    """Why a file is not read; the caller adds its name."""


class _Inert:
    """Accepts what a pickle does to an object, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return _Inert()

    def __setstate__(*_: Any) -> None:
        pass

    def __setitem__(*_: Any) -> None:
        pass

    def append(*_: Any) -> None:
        pass

    def extend(*_: Any) -> None:
        pass


class _Dict(dict[Any, Any]):
    """In the place of ``OrderedDict``; drops attributes such as a state dict's ``_metadata``."""

    def __setstate__(*_: Any) -> None:
        pass


class _Storage(_Inert):
    """In the place of ``torch.FloatStorage`` and its like."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Tensor(_Inert):
    """In the place of ``_rebuild_tensor_v2``: describes a view of a stored array."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class _Parameter(_Inert):
    """In the place of ``_rebuild_parameter``: the tensor it wraps."""

    def __new__(cls, data: Any, *_: Any) -> Any:
        return data


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Parameter
        if module == "torch" and name in _DTYPES:
            return _Storage(_DTYPES[name])
        if module.split(".")[0] in _FOREIGN_PACKAGES or (module, name) in _FOREIGN_NAMES:
            return _Inert
        raise RefusedError(f"it wants to call {module}.{name}, which has no place in a checkpoint")

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype, int]:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage) or not isinstance(count, int):
            raise RefusedError(f"unknown reference {kind!r}")
        return str(key), storage.dtype, count


def read(path: Path) -> Any:
    """The content of a zip checkpoint, as plain containers.

    Tensors are read at the top level and one mapping deep, which is where state dicts are; elsewhere they stay
    placeholders, like every foreign object.

    Raises:
        RefusedError: no such checkpoint, damaged, or it names code that no checkpoint needs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise RefusedError("a zip archive, but no PyTorch checkpoint")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != sys.byteorder.encode():
                raise RefusedError("it was written on a machine of the other byte order")
            pickled = archive.read(pickles[0])
            _require_plain(pickled)
            content = _Unpickler(io.BytesIO(pickled)).load()
            return _with_tensors(content, archive, root)
    except RefusedError:
        raise
    except Exception as error:  # a damaged or hostile file makes the standard library raise almost anything
        raise RefusedError(f"damaged or truncated ({type(error).__name__}: {error})") from error


def _require_plain(pickled: bytes) -> None:
    """Refuses opcodes that torch.save never writes, and memo indices made to exhaust the memory."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in _REFUSED_OPCODES:
            raise RefusedError(f"it uses the pickle opcode {opcode.name}")
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(pickled):
            raise RefusedError(f"it asks for {argument} memo entries")


def _with_tensors(content: Any, archive: zipfile.ZipFile, root: str) -> Any:
    if not isinstance(content, dict):
        return content
    storages: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        return _tensor(value, archive, root, storages) if isinstance(value, _Tensor) else value

    return {
        key: {inner: plain(item) for inner, item in value.items()} if isinstance(value, dict) else plain(value)
        for key, value in content.items()
    }


def _tensor(described: _Tensor, archive: zipfile.ZipFile, root: str, storages: dict[str, Tensor]) -> Tensor:
    key, dtype, count = described.storage
    if key not in storages:
        entry = archive.getinfo(f"{root}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
            raise RefusedError(f"its array {key} is not the {count} values of {dtype} that it should be")
        data = bytearray(archive.read(entry))
        storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    # as_strided refuses views beyond the storage
    return torch.as_strided(storages[key], described.size, described.stride, described.offset)
