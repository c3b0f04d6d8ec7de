"""Safe reading of files: nothing that a file names is imported or executed, and none asks for much more than it has."""

from __future__ import annotations

import io
import json
import pickle
import reprlib
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ..io.pillow_images import check_regular
from .pickles import names_in, placeholders

_ALLOWING = threading.Lock()  # torch keeps one list of allowed names for the whole process
_LARGEST = {"JSON": 1 << 24, "YAML": 1 << 16}  # bytes of a file; a variant.yml has 2,000
# Bytes in float32 for each byte of a file: tensors of one byte a value, each used twice; and some room for small files.
_EXPANSION, _ROOM = 8, 1 << 20
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxother = 2, 60


class CheckpointError(ValueError):
    """A source that cannot or must not be loaded; the message names it and the reason, in at most 20,000 characters."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= 20_000 else f"{message[:20_000]}...")


class _YamlLoader(yaml.SafeLoader):
    """Plain YAML plus ``!!python/tuple``, the tag of the image size in official variant.yml files.

    Keys are scalars: mappings that merge others, and tuples of tuples as keys, grow exponentially.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse other keys, where YAML would merge mappings."""
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "keys must be plain", key.start_mark)


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_YamlLoader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


def shown(value: object) -> str:
    """Return a short form of a value from a file, for a message: nested lists of YAML may stand for gigabytes."""
    text = _SHORT.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a file whose name ends in .json, or in a YAML file.

    Every Python tag of YAML but ``!!python/tuple`` is refused.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not of that language, a refused tag, no mapping, too large or nested too deeply.
    """
    check_regular(path, "checkpoint")
    language = "JSON" if path.suffix == ".json" else "YAML"
    if (size := path.stat().st_size) > _LARGEST[language]:
        raise CheckpointError(f"{path} has {size:,} bytes, more than the {_LARGEST[language]:,} of a {language} file")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if language == "JSON" else yaml.load(text, _YamlLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"{path} is refused as {language}: {str(error)[:500]}") from error
    except (RecursionError, TypeError, AttributeError) as error:  # the last two: PyYAML, of tags that do not fit
        reason = "nested too deeply" if isinstance(error, RecursionError) else "its tags do not fit its values"
        raise CheckpointError(f"{path} is refused as {language}: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a mapping, not {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, or of the files that an index (.safetensors.index.json) names.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, truncated or of another format.
    """
    if path.name.endswith(".json"):
        return _read_shards(path)
    check_regular(path, "checkpoint")
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_mapping(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} must have a weight_map of names of tensors and files")
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or len(name) > 255 or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} must name safetensors files beside it, got {shown(name)}")
        state |= read_safetensors(index.parent / name)
    if missing := sorted(places.keys() - state.keys()):
        raise CheckpointError(f"{index}: its files lack {shown(missing)}")
    return state


def require_stored(tensors: Mapping[str, Tensor], size: int, name: str) -> None:
    """Require that tensors are not much larger than the file that they come from, before they are copied.

    Raises:
        CheckpointError: an expanded view, say, which takes no memory until it is copied.
    """
    needed = sum(4 * tensor.numel() for tensor in tensors.values())
    if needed > _EXPANSION * size + _ROOM:
        largest = max(tensors, key=lambda key: tensors[key].numel())
        shape = tuple(tensors[largest].shape)
        raise CheckpointError(
            f"{name} claims {needed / 1e9:.3g} GB of tensors in {size / 1e6:.3g} MB: {largest} is {shape}"
        )


def read_torch(path: Path) -> Any:
    """Return the content of a file of ``torch.save``, read with ``weights_only=True``.

    Objects beside the tensors, such as mmengine's histories, an ``argparse.Namespace`` or a class of a user's program,
    become placeholders that do nothing, and a defaultdict becomes a dict. A name of a function refuses the file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, truncated, of another format, or it names other code.
    """
    check_regular(path, "checkpoint")
    with path.open("rb") as file:
        return read_pickled(file, path.stat().st_size, str(path), path)


def read_pickled(file: IO[bytes], size: int, name: str, source: Path | None = None) -> Any:
    """Return the content of ``size`` bytes of ``torch.save``, see ``read_torch``; ``source``: where they are a file."""
    start = file.read(4)
    file.seek(0)
    is_pickle = start[:2] in {b"PK", *(bytes((0x80, version)) for version in range(2, 6))}
    try:
        known = placeholders(_names(file, size) if is_pickle else set())
        file.seek(0)
        with _ALLOWING, torch.serialization.safe_globals(known):
            return torch.load(source or file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if is_pickle:
            raise CheckpointError(f"{name} is refused, and nothing in it was executed: {_reason(error)}") from error
        raise CheckpointError(f"{name} is damaged, truncated or no PyTorch checkpoint") from error
    except Exception as error:  # torch raises almost anything for a damaged file
        reason = f" ({_reason(error)})" if is_pickle else ""
        raise CheckpointError(f"{name} is damaged, truncated or no PyTorch checkpoint{reason}") from error


def _names(file: IO[bytes], size: int) -> set[str]:
    """Return the names in the pickles of a checkpoint, see ``names_in``.

    Raises:
        UnpicklingError: an archive whose entries are larger than itself.
    """
    if file.read(4) == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            entries = sum(entry.file_size for entry in archive.infolist())
        if entries > size:
            raise pickle.UnpicklingError(f"its entries have {entries:,} bytes in an archive of {size:,}")
        file.seek(0)
        return names_in(io.BytesIO(torch._C.PyTorchFileReader(file).get_record("data.pkl")))
    file.seek(0)
    return set().union(*(names_in(file) for _ in range(5)))  # PyTorch's older format is five pickles, then the tensors


def _reason(error: Exception) -> str:
    """Return the first sentence of torch's error that is no advice on how to read the file unsafely."""
    advice = ("Weights only load failed", "(1)", "(2)", "Check the documentation")
    lines = [line.strip() for line in str(error).split("WeightsUnpickler error:")[-1].splitlines()]
    reasons = [line for line in lines if " " in line and not line.startswith(advice)]  # not a bare KeyError's key
    return (reasons or [type(error).__name__])[0].split(". ")[0][:300]
