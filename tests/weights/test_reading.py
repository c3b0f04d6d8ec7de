"""Safe reading of files: what is damaged, foreign or hostile is refused by name, and nothing runs."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segmenter_fast.weights.reading import CheckpointError, read_json, read_safetensors, read_torch, read_yaml
from support.checkpoints import GOLDEN, Touches

READERS = (read_yaml, read_json, read_safetensors, read_torch)


@pytest.mark.parametrize("read", READERS)
def test_a_missing_file_is_named(read, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n\x00", b"[1, 2", b"\x00" * 9, b"hello"])
def test_something_else_is_refused_by_name(read, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"other\.bin"):
        read(path)


def test_yaml_understands_tuples(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("size: !!python/tuple\n- 64\n- 32\nplain: [1, 2]\n")
    assert read_yaml(path) == {"size": (64, 32), "plain": [1, 2]}


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
        read_yaml(path)
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
