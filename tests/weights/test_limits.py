"""Files that ask for much more memory or time than they have, and configurations of wrong types: one error each."""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import segmenter_fast as sf
from segmenter_fast.weights.reading import CheckpointError, read_mapping, shown
from support.checkpoints import GOLDEN, official_folder, small_model
from support.predict import call

STATE = small_model().state_dict()


def test_an_expanded_tensor_is_refused_before_it_is_copied(tmp_path: Path) -> None:
    huge = torch.zeros(1, 1).expand(1 << 20, 1 << 20)  # 4 TB in 4 bytes
    content = {**STATE, "decoder.proj_dec.weight": huge}
    torch.save({"model": content}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth claims 4\.4e\+03 GB .*proj_dec\.weight is \(1048576, "):
        sf.load(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"claims 4\.4e\+03 GB"):
        sf.create_model("seg_t_mask_16", pretrained=tmp_path / "a.pth")
    with (
        pytest.warns(UserWarning, match="without a configuration"),
        pytest.raises(CheckpointError, match=r"size mismatch for decoder\.proj_dec\.weight"),
    ):
        sf.load(content)  # in memory: names and shapes come first, too


def test_an_expanded_tensor_of_the_right_shape_is_read(tmp_path: Path) -> None:
    torch.save({**STATE, "encoder.norm.weight": torch.ones(1).expand(64)}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="without a configuration"):
        assert torch.equal(sf.load(tmp_path / "a.pth").encoder.norm.weight, torch.ones(64))


def test_a_tensor_without_values_is_refused() -> None:
    content = {**STATE, "encoder.norm.weight": torch.ones(64, device="meta")}
    with (
        pytest.warns(UserWarning, match="conf"),
        pytest.raises(CheckpointError, match=r"norm\.weight .*without values"),
    ):
        sf.load(content)


def test_an_archive_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(1 << 26))
    assert (tmp_path / "a.pth").stat().st_size < 1 << 17
    with pytest.raises(CheckpointError, match=r"a\.pth is refused.*its entries have 67,108,868 bytes in an archive of"):
        sf.load(tmp_path / "a.pth")


def our_folder(folder: Path, **changes: Any) -> Path:
    small_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


WRONG = [
    *(("depth", value) for value in ("12", None, 2.0, True, [2], {}, 10**400)),
    *(("num_classes", value) for value in ("3", [3], float("nan"))),
    *(("mlp_ratio", value) for value in ("4", None, float("inf"), 10**400, True)),
    *(("class_token", value) for value in (1, "yes", None)),
    *(("image_size", value) for value in ("32", [32], [32, 32, 32], [32.0, 32], ["32", "32"], None, True)),
    *(("mean", value) for value in (0.5, "0.5", [0.5, 0.5], [0.5, 0.5, "0.5"], [0.5, 0.5, float("nan")], {"r": 1})),
    *(("decoder", value) for value in (1, None, ["mask"])),
    *(("class_names", value) for value in ("abc", [1, 2, 3], {"a": 1}, [["a"], ["b"], ["c"]])),
    *(("palette", value) for value in ([[0, 0]] * 3, [0, 0, 0], "red", [[0, 0, "0"]] * 3)),
    *(("timm_backbone", value) for value in (3, ["a"])),
    *(("window_size", value) for value in ("32", 32.5)),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=str)
def test_a_configuration_of_a_wrong_type_names_the_field(field: str, value: Any, tmp_path: Path) -> None:
    folder = our_folder(tmp_path, **{field: value})
    with pytest.raises(CheckpointError, match=rf"{field} (must be|is)|config\.json is refused as JSON") as caught:
        sf.load(folder)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"depth": 10**9}, "depth is 1000000000, the weights have 2 layers"),
        ({"decoder_depth": 10**9}, "decoder_depth is 1000000000, the weights have 2 layers"),
        ({"embed_dim": 10**12, "num_heads": 1, "decoder_num_heads": 1}, "sizes that no tensor can have"),
        ({"num_classes": 10**12}, "size mismatch|sizes that no tensor can have"),
        ({"mlp_ratio": 1e300}, "sizes that no tensor can have"),
        ({"image_size": [10**9, 10**9]}, "size mismatch|sizes that no tensor can have"),
        ({"head_classes": 10**30}, "sizes that no tensor can have"),
        ({"num_register_tokens": 10**8}, "Missing key|size mismatch"),
    ],
)
def test_absurd_sizes_are_compared_before_they_are_built(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder, start = our_folder(tmp_path, **changes), time.perf_counter()
    with pytest.raises(CheckpointError, match=reason):
        sf.load(folder)
    assert time.perf_counter() - start < 5


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{one}: &{one} [{', '.join(f'*{before}' for _ in range(9))}]\n"
    for before, one in zip("abcdefg", "bcdefgh", strict=True)
)


def test_a_message_about_nested_aliases_is_short(tmp_path: Path) -> None:
    folder = official_folder(tmp_path)
    variant = ALIASES + (folder / "variant.yml").read_text().replace("n_layers: 2", "n_layers: *h")
    (folder / "variant.yml").write_text(variant)
    with pytest.raises(CheckpointError, match="n_layers must be an integer") as caught:
        sf.load(folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '{"a":' * 100_000, "nested too deeply"),
        ("a.yml", "[" * 20_000, "nested too deeply"),
        ("a.yml", "a: " + "{b: " * 10_000, "nested too deeply"),
        ("a.yml", "# " * 40_000, "65,536 of a YAML file"),
        ("a.yml", "a: &a {x: 1}\nb:\n  <<: [*a, *a]\n", "keys must be plain"),
        ("a.yml", "? [1, 2]\n: 3\n", "keys must be plain"),
        ("a.yml", "a: !!python/tuple 3\n", ""),
        ("a.yml", "a: !!binary [1]\n", ""),
        ("a.yml", "a: !!int x\n", ""),
        ("a.json", '{"a": ' + "9" * 10_000 + "}", ""),
    ],
)
def test_hostile_texts_give_one_error(name: str, text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{name} (is refused|has).*{reason}"):
        read_mapping(tmp_path / name)


def test_values_are_shown_in_short() -> None:
    assert shown("two") == "'two'"
    assert len(shown(["x" * 10_000] * 10_000)) <= 120
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep, deep]
    assert len(shown(deep)) <= 120


@pytest.mark.parametrize(
    "content", [b"\xff\xd8\xff\xe0", b"\x89PNG", b"II*\0", b"BM", b"GIF89a", b"RIFF", b"import os\n", b"c"]
)
def test_info_of_another_file_has_no_text_of_pytorch(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(content + bytes(range(256)) * 4)
    result = call("info", tmp_path / "photo.jpg")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'photo.jpg'} is damaged, truncated or no PyTorch checkpoint\n"


def test_a_variant_is_still_what_it_was() -> None:
    assert sf.load(GOLDEN / "official_mask").config.window_stride == 48
