"""Foreign objects in checkpoints stay inert: not imported, not executed, and unable to change the program."""

from __future__ import annotations

import contextlib
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from segmenter_fast.weights import safe_unpickle as foreign
from segmenter_fast.weights.reading import CheckpointError, read_torch
from support.checkpoints import save_pickle, save_with_history


def test_tensors_beside_foreign_objects_are_read(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = {
        "view": base[1:, ::2],
        "transposed": base.T,
        "parameter": torch.nn.Parameter(base[0]),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }
    save_with_history(tmp_path / "a.pth", {"state_dict": state, "meta": {"classes": ("a", "b")}, "top": base})
    content = read_torch(tmp_path / "a.pth")
    assert content["state_dict"].keys() == state.keys()
    for key, tensor in state.items():
        assert content["state_dict"][key].dtype == tensor.dtype
        assert torch.equal(content["state_dict"][key], tensor), key
    assert torch.equal(content["top"], base)
    assert content["meta"] == {"classes": ("a", "b")}


def test_attributes_of_state_dicts_are_dropped(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    assert state._metadata
    save_with_history(tmp_path / "a.pth", {"state_dict": state})
    assert type(read_torch(tmp_path / "a.pth")["state_dict"]) is dict


def test_the_packages_a_file_names_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, marker = tmp_path / "mmengine" / "logging", tmp_path / "marker"
    package.mkdir(parents=True)
    (tmp_path / "mmengine" / "__init__.py").write_text(f"open({str(marker)!r}, 'w')")
    (package / "__init__.py").write_text("")
    (package / "history_buffer.py").write_text("class HistoryBuffer: pass")
    save_with_history(tmp_path / "a.pth", {"state_dict": {"w": torch.ones(2)}})
    monkeypatch.syspath_prepend(tmp_path)
    assert torch.equal(read_torch(tmp_path / "a.pth")["state_dict"]["w"], torch.ones(2))
    assert not marker.exists()
    assert not any(name.startswith("mmengine") for name in sys.modules)


def test_a_gadget_in_a_known_package_is_not_called(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    call = f"cnumpy.testing._private.utils\nrunstring\n(Vopen({str(marker)!r}, 'w')\n}}tR."
    save_pickle(tmp_path / "a.pth", b"\x80\x02" + call.encode())
    assert isinstance(foreign.read(tmp_path / "a.pth"), foreign._Inert)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"cposix\nsystem\n(Vtouch MARKER\ntR.", "posix.system"),
        (b"c__builtin__\neval\n(Vopen('MARKER', 'w')\ntR.", "__builtin__.eval"),
        (b"c__builtin__\n__import__\n(Vos\ntR.", "__import__"),
        (b"ctorch.hub\nload\n(Va\ntR.", "torch.hub.load"),
        (b"ctorch._utils\n_rebuild_tensor_v3\n.", "_rebuild_tensor_v3"),
        (b"cmmenginex\nsystem\n(tR.", "mmenginex.system"),
        (b"(Vtouch MARKER\niposix\nsystem\n.", "INST"),
        (b"(cposix\nsystem\nVtouch MARKER\no.", "OBJ"),
        (b"\x82\x01.", "EXT1"),
        (b"Pstorage\n.", "PERSID"),
        (b"]r\xff\xff\xff\x7f.", "memo entries"),
        (b"(Vmodule\ncnumpy\nndarray\nV0\nVcpu\nK\x01tQ.", "unknown reference"),
        (b"(Vstorage\ncnumpy\nndarray\nV0\nVcpu\nK\x01tQ.", "unknown reference"),
        (b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nK\x01tQ", "damaged or truncated"),
        # changing what later loads would use: attributes of the exposed classes
        (b"ctorch._utils\n_rebuild_tensor_v2\n.", None),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(N}Vsize\nK\x01stb.", None),
        (b"ccollections\nOrderedDict\n(N}Vitems\nK\x01stb.", None),
        (b"ccollections\nOrderedDict\n}Vitems\nK\x01sb.", None),
        (b"cnumpy\nndarray\n(N}V__call__\nK\x01stb.", None),
        (b"ctorch\nFloatStorage\n(N}Vdtype\nK\x01stb.", None),
    ],
)
def test_hostile_pickles(pickled: bytes, reason: str | None, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    exposed = (foreign._Inert, foreign._Dict, foreign._Storage, foreign._Tensor, foreign._Parameter)
    before = [dict(vars(cls)) for cls in exposed]
    path = tmp_path / "evil.pth"
    save_pickle(path, b"\x80\x02" + pickled.replace(b"MARKER", str(marker).encode()))
    if reason is None:
        foreign.read(path)
    else:
        with pytest.raises(foreign.RefusedError, match=reason):
            foreign.read(path)
    with contextlib.suppress(CheckpointError):
        read_torch(path)
    assert not marker.exists()
    assert [dict(vars(cls)) for cls in exposed] == before


def test_every_name_beyond_the_list_is_refused(tmp_path: Path) -> None:
    for module, name in [("os", "system"), ("subprocess", "run"), ("builtins", "exec"), ("pickle", "loads")]:
        save_pickle(tmp_path / "a.pth", f"c{module}\n{name}\n.".encode())
        with pytest.raises(foreign.RefusedError, match=name):
            foreign.read(tmp_path / "a.pth")


def _rewritten(source: Path, target: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Copies a zip file with some entries, by the end of their name, replaced."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w", compression) as after:
        for name in before.namelist():
            replaced = [content for end, content in entries.items() if name.endswith(end)]
            after.writestr(name, replaced[0] if replaced else before.read(name))


def test_arrays_must_have_their_size(tmp_path: Path) -> None:
    save_with_history(tmp_path / "a.pth", {"state_dict": {"w": torch.ones(8)}})
    _rewritten(tmp_path / "a.pth", tmp_path / "short.pth", {"/data/0": b"\0" * 4})
    with pytest.raises(CheckpointError, match=r"short\.pth.*array 0"):
        read_torch(tmp_path / "short.pth")
    _rewritten(tmp_path / "a.pth", tmp_path / "deflated.pth", {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(foreign.RefusedError, match="array 0"):
        foreign.read(tmp_path / "deflated.pth")


def test_views_beyond_the_array_are_refused(tmp_path: Path) -> None:
    save_with_history(tmp_path / "a.pth", {"state_dict": {"w": torch.arange(5.0)[1:]}})
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        pickled = archive.read("a/data.pkl")
    assert pickled.count(b"QK\x01K\x04") == 1  # offset 1, size 4
    for offset_and_size in (b"QK\x01K\x05", b"QK\x09K\x04"):
        longer = pickled.replace(b"QK\x01K\x04", offset_and_size)
        _rewritten(tmp_path / "a.pth", tmp_path / "b.pth", {"data.pkl": longer})
        with pytest.raises(CheckpointError, match=r"b\.pth"):
            read_torch(tmp_path / "b.pth")


def test_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    save_with_history(tmp_path / "a.pth", {"state_dict": {"w": torch.ones(8)}})
    other = b"big" if sys.byteorder == "little" else b"little"
    _rewritten(tmp_path / "a.pth", tmp_path / "b.pth", {"byteorder": other})
    with pytest.raises(foreign.RefusedError, match="byte order"):
        foreign.read(tmp_path / "b.pth")


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("folder/readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"a\.zip"):
        read_torch(tmp_path / "a.zip")
    with pytest.raises(foreign.RefusedError, match="no PyTorch checkpoint"):
        foreign.read(tmp_path / "a.zip")


def test_a_list_of_itself_is_no_endless_loop(tmp_path: Path) -> None:
    content: list[object] = []
    content.append(content)
    save_pickle(tmp_path / "a.pth", pickle.dumps(content, protocol=2))
    assert len(foreign.read(tmp_path / "a.pth")) == 1
