"""Objects beside the tensors become placeholders; pickles that ask for too much time or memory are refused."""

from __future__ import annotations

import argparse
import datetime
import enum
import io
import pathlib
import pickle
import sys
import time
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segmenter_fast.weights.pickles import Placeholder, names_in, placeholders
from segmenter_fast.weights.reading import CheckpointError, read_torch
from support.checkpoints import Touches, save_pickle


class Loud:
    """Fails where it is unpickled for real."""

    def __init__(self, *_: Any) -> None:
        self.value = 3

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("a class of a checkpoint was used")


class Settings(dict):
    """As the configurations of yacs and mmengine, which are dicts with attributes."""

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("a class of a checkpoint was used")


class Kind(enum.Enum):
    linear = 1


def save_of_a_program(content: dict[str, Any], path: Path, **options: Any) -> None:
    """Write a checkpoint whose classes are those of a program that is not installed."""
    lab = types.ModuleType("lab"), types.ModuleType("lab.train")
    for kind in (Loud, Settings, Kind):
        setattr(lab[1], kind.__name__, kind)
        kind.__module__ = "lab.train"
    sys.modules |= {module.__name__: module for module in lab}
    try:
        torch.save(content, path, **options)
    finally:
        for module in lab:
            del sys.modules[module.__name__]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_objects_of_trainers_are_inert(zipped: bool, tmp_path: Path) -> None:
    settings = Settings(lr=0.1, model=Settings(depth=2))
    settings.frozen = True  # type: ignore[attr-defined]
    inert = {
        "args": argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath("data"), kind=Kind.linear, types=(int, str)),
        "settings": settings,
        "object": Loud(),
        "kind": Kind.linear,
        "path": pathlib.Path("runs"),
        "when": datetime.datetime(2024, 5, 1),
        "scalar": np.float64(0.5),
        "count": np.int64(3),
        "array": np.arange(3),
    }
    counts = defaultdict(int, {"steps": 3})
    content = {"model": {"w": torch.arange(3.0)}, "epoch": 7, "counts": counts, "names": ("a",), **inert}
    save_of_a_program(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_torch(tmp_path / "a.pth")
    assert torch.equal(read["model"]["w"], torch.arange(3.0))
    assert (read["epoch"], read["counts"], read["names"]) == (7, {"steps": 3}, ("a",))
    assert all(isinstance(read[name], Placeholder) for name in inert)
    assert type(read["object"]).__name__ == "lab.train.Loud"
    assert "lab.train" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        *(
            "os.system",
            "subprocess.Popen",
            "importlib.import_module",
            "builtins.eval",
            "builtins.exec",
            "lab.train.run",
        ),
        *("shutil.rmtree", "pickle.loads", "torch.hub.load", "socket.socket", "ctypes.CDLL", "functools.reduce"),
    ],
)
def test_functions_and_the_system_are_no_placeholders(name: str) -> None:
    assert [known for _, known in placeholders({name})] == ["collections.defaultdict"]


def test_the_older_format_refuses_code_too(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"args": argparse.Namespace(), "x": Touches(marker)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth is refused, and nothing in it was executed: .*system"):
        read_torch(tmp_path / "a.pth")
    assert not marker.exists()


def nested(levels: int, memo: bool) -> bytes:
    """A pickled tuple in which each level holds the one before, twice with ``memo``."""
    pickled = b"\x80\x02}K\x01\x85"
    for level in range(levels):
        again = b"r" + level.to_bytes(4, "little") + b"j" + level.to_bytes(4, "little") + b"\x86"
        pickled += again if memo else b"\x85"
    return pickled + b"K\x01s."  # as the key of a dict


@pytest.mark.parametrize(("levels", "memo"), [(60, True), (100_000, False)], ids=["exponential", "deep"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_key_that_takes_too_long_to_hash_is_refused(levels: int, memo: bool, zipped: bool, tmp_path: Path) -> None:
    path, pickled = tmp_path / "slow.pth", nested(levels, memo)
    save_pickle(path, pickled) if zipped else path.write_bytes(pickled)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"slow\.pth is refused.*a tuple of tuples that takes too long to hash"):
        read_torch(path)
    assert time.perf_counter() - start < 5


def test_keys_of_the_usual_size_are_read(tmp_path: Path) -> None:
    content = {("a", (1, (2, 3))): 1, "names": tuple(f"class {index}" for index in range(21_843))}
    torch.save(content, tmp_path / "a.pth")
    assert read_torch(tmp_path / "a.pth") == content


def test_memory_by_a_number_is_refused(tmp_path: Path) -> None:
    save_pickle(tmp_path / "a.pth", b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x40\x85R.")
    with pytest.raises(CheckpointError, match=r"a\.pth is refused.*asks for memory by builtins\.bytearray"):
        read_torch(tmp_path / "a.pth")


def test_names_of_python_2_are_translated() -> None:
    assert names_in(io.BytesIO(b"\x80\x02c__builtin__\nlong\n.")) == {"builtins.int"}
    assert names_in(io.BytesIO(pickle.dumps({"a": [1, (2,)]}, protocol=2))) == set()
