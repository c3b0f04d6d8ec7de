"""Safe reading: damaged, unknown and hostile files are refused by name, and nothing that they name runs."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segmenter_fast.weights.pickles import Placeholder
from segmenter_fast.weights.reading import CheckpointError, read_mapping, read_safetensors, read_torch
from support.checkpoints import GOLDEN, Touches, save_pickle, save_with_history

READERS = (read_mapping, read_safetensors, read_torch)


@pytest.mark.parametrize("read", READERS)
def test_a_missing_file_is_named(read, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")


@pytest.mark.parametrize("read", READERS)
def test_a_pipe_is_not_waited_for(read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"checkpoint .*pipe cannot be read: it is no regular file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("read", "name"),
    [*((read, "other.bin") for read in READERS), (read_mapping, "other.json")],
)
@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n\x00", b"[1, 2", b"\x00" * 9, b"hello"])
def test_other_content_is_refused_by_name(read, name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        read(path)


def test_yaml_understands_tuples(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("size: !!python/tuple\n- 64\n- 32\nplain: [1, 2]\n")
    assert read_mapping(path) == {"size": (64, 32), "plain": [1, 2]}


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch MARKER']",
        "!!python/object/new:os.system ['touch MARKER']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [!!python/object/apply:os.system ['touch MARKER']]",
    ],
)
def test_yaml_refuses_other_tags(tag: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "variant.yml", tmp_path / "marker"
    path.write_text(f"net_kwargs: {tag}\n".replace("MARKER", str(marker)))
    with pytest.raises(CheckpointError, match=r"variant\.yml.*\n?.*python/"):
        read_mapping(path)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_executes_code_is_refused_and_nothing_runs(zipped: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save({"model": Touches(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"evil\.pth is refused.*system"):
        read_torch(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file is what it claims to be
    assert marker.exists()


def test_a_bare_pickle_that_executes_code_is_refused(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pkl", tmp_path / "marker"
    path.write_bytes(pickle.dumps(Touches(marker), protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pkl is refused"):
        read_torch(path)
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(share: float, tmp_path: Path) -> None:
    whole = (GOLDEN / "official_mask" / "checkpoint.pth").read_bytes()
    path = tmp_path / "half.pth"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"half\.pth is damaged, truncated"):
        read_torch(path)


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    whole = (GOLDEN / "official_mask" / "cases.safetensors").read_bytes()
    path = tmp_path / "half.safetensors"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"half\.safetensors is damaged"):
        read_safetensors(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_never_gives_another_error(tmp_path: Path, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    zipped = data.draw(st.booleans())
    torch.save({"model": torch.nn.Linear(2, 3).state_dict()}, buffer, _use_new_zipfile_serialization=zipped)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.pth"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read_torch(path)
    except CheckpointError as error:
        assert "damaged.pth" in str(error)  # noqa: PT017


def test_tensors_beside_objects_of_mmengine_are_read(tmp_path: Path) -> None:
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
    assert isinstance(content["message_hub"]["log_scalars"]["loss"], Placeholder)


def test_a_defaultdict_is_read_as_a_dict(tmp_path: Path) -> None:
    state, counts = defaultdict(dict, {"w": torch.ones(2)}), defaultdict(int, {"steps": 3})
    torch.save({"state_dict": state, "counts": counts, "of lists": defaultdict(list)}, tmp_path / "a.pth")
    content = read_torch(tmp_path / "a.pth")
    assert torch.equal(content["state_dict"]["w"], torch.ones(2))
    assert content["counts"] == {"steps": 3}
    assert content["of lists"] == {}


def test_the_packages_a_file_names_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, marker = tmp_path / "mmengine" / "logging", tmp_path / "marker"
    package.mkdir(parents=True)
    (tmp_path / "mmengine" / "__init__.py").write_text(f"open({str(marker)!r}, 'w')")
    (package / "__init__.py").write_text("")
    (package / "history_buffer.py").write_text("class HistoryBuffer: pass")
    save_with_history(tmp_path / "a.pth", {"state_dict": {"w": torch.ones(2)}})
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmengine"]:  # other tests run the real one
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(read_torch(tmp_path / "a.pth")["state_dict"]["w"], torch.ones(2))
    assert not marker.exists()
    assert not any(name.startswith("mmengine") for name in sys.modules)


def test_names_are_allowed_for_one_reading_only(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    save_with_history(tmp_path / "a.pth", {"state_dict": {"w": torch.ones(2)}})
    read_torch(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=True)


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"cos\nsystem\n(Vtouch MARKER\ntR.", "os.system"),
        (b"cposix\nsystem\n(Vtouch MARKER\ntR.", "posix.system"),
        (b"csubprocess\nrun\n(Vtouch MARKER\ntR.", "subprocess.run"),
        (b"cpickle\nloads\n.", "pickle.loads"),
        (b"c__builtin__\neval\n(Vopen('MARKER', 'w')\ntR.", "eval"),
        (b"cbuiltins\nexec\n(Vopen('MARKER', 'w')\ntR.", "exec"),
        (b"c__builtin__\n__import__\n(Vos\ntR.", "__import__"),
        (b"ctorch.hub\nload\n(Va\ntR.", "torch.hub.load"),
        (b"cmmenginex\nsystem\n(tR.", "mmenginex.system"),
        (b"(Vtouch MARKER\niposix\nsystem\n.", "operand"),
        (b"(cposix\nsystem\nVtouch MARKER\no.", "posix.system|operand"),
        (b"\x82\x01.", "operand"),
        (b"Pstorage\n.", "operand"),
        (b"]r\xff\xff\xff\x7f.", None),
        (b"(Vmodule\ncnumpy\nndarray\nV0\nVcpu\nK\x01tQ.", "persistent_load"),
        (b"(Vstorage\ncnumpy\nndarray\nV0\nVcpu\nK\x01tQ.", "damaged"),
        (b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nK\x01tQ", "damaged"),
        # a function of a known package that runs its argument
        (b"cnumpy.testing._private.utils\nrunstring\n(Vopen('MARKER', 'w')\n}tR.", None),
        # attributes of classes and functions that later readings use
        (b"ctorch._utils\n_rebuild_tensor_v2\n(N}Vsize\nK\x01stb.", "Can only build"),
        (b"ccollections\nOrderedDict\n(N}Vitems\nK\x01stb.", "Can only build"),
        (b"ccollections\nOrderedDict\n}Vitems\nK\x01sb.", "Can only build"),
        (b"cnumpy\nndarray\n(N}V__call__\nK\x01stb.", "Can only build"),
        (b"cnumpy\nndarray\n)R(N}V__call__\nK\x01stb.", None),
        (b"ctorch\nFloatStorage\n(N}Vdtype\nK\x01stb.", "Can only build"),
    ],
)
def test_hostile_pickles(pickled: bytes, reason: str | None, tmp_path: Path) -> None:
    """Each is refused, or read without an effect on the program."""
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    exposed = (Placeholder, OrderedDict, torch._utils._rebuild_tensor_v2, torch.FloatStorage)
    before = [dict(vars(each)) for each in exposed]
    pickled = pickled.replace(b"MARKER", str(marker).encode())
    # texts as torch.save writes them, so that none is refused for its opcode
    pickled = re.sub(rb"V(.*)\n", lambda text: b"X" + struct.pack("<I", len(text[1])) + text[1], pickled)
    save_pickle(path, b"\x80\x02" + pickled)
    if reason is None:
        read_torch(path)
    else:
        with pytest.raises(CheckpointError, match=rf"evil\.pth.*({reason})"):
            read_torch(path)
    assert not marker.exists()
    assert [dict(vars(each)) for each in exposed] == before


def rewrite(source: Path, target: Path, entries: dict[str, bytes]) -> None:
    """Copy a zip file with some entries, by the end of their name, replaced."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for name in before.namelist():
            replaced = [content for end, content in entries.items() if name.endswith(end)]
            after.writestr(name, replaced[0] if replaced else before.read(name))


def test_arrays_must_have_their_size(tmp_path: Path) -> None:
    save_with_history(tmp_path / "a.pth", {"state_dict": {"w": torch.ones(8)}})
    rewrite(tmp_path / "a.pth", tmp_path / "short.pth", {"/data/0": b"\0" * 4})
    with pytest.raises(CheckpointError, match=r"short\.pth.*size"):
        read_torch(tmp_path / "short.pth")


def test_views_beyond_the_array_are_refused(tmp_path: Path) -> None:
    save_with_history(tmp_path / "a.pth", {"state_dict": {"w": torch.arange(5.0)[1:]}})
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        pickled = archive.read("a/data.pkl")
    assert pickled.count(b"QK\x01K\x04") == 1  # offset 1, size 4
    for offset_and_size in (b"QK\x01K\x05", b"QK\x09K\x04"):
        rewrite(tmp_path / "a.pth", tmp_path / "b.pth", {"data.pkl": pickled.replace(b"QK\x01K\x04", offset_and_size)})
        with pytest.raises(CheckpointError, match=r"b\.pth"):
            read_torch(tmp_path / "b.pth")


def test_a_file_of_the_other_byte_order_is_read(tmp_path: Path) -> None:
    save_with_history(tmp_path / "a.pth", {"state_dict": {"w": torch.arange(8.0)}})
    other = "big" if sys.byteorder == "little" else "little"
    swapped = torch.arange(8.0).numpy().byteswap().tobytes()
    rewrite(tmp_path / "a.pth", tmp_path / "b.pth", {"byteorder": other.encode(), "/data/0": swapped})
    assert torch.equal(read_torch(tmp_path / "b.pth")["state_dict"]["w"], torch.arange(8.0))


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("folder/readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"a\.zip"):
        read_torch(tmp_path / "a.zip")


def test_a_list_of_itself_is_no_endless_loop(tmp_path: Path) -> None:
    content: list[object] = []
    content.append(content)
    save_pickle(tmp_path / "a.pth", pickle.dumps(content, protocol=2))
    assert len(read_torch(tmp_path / "a.pth")) == 1
