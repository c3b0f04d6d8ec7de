"""Random and hostile checkpoints: each loads, or gives one short error that names the file, and nothing else happens.

``FUZZ_CASES=10000`` sets the number of cases.
"""

from __future__ import annotations

import collections
import io
import json
import os
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import segmenter_fast as sf
from segmenter_fast.weights.reading import CheckpointError
from support.checkpoints import GOLDEN, save_pickle, small_model

CASES = int(os.environ.get("FUZZ_CASES", "200"))
LONGEST_MESSAGE, LONGEST_TIME, MOST_MEMORY = 20_100, 10.0, 1 << 29
MODEL = small_model()
STATE = MODEL.state_dict()
CONFIG = (
    "model = dict(backbone=dict(type='VisionTransformer', num_heads=2, img_size=(64, 64), norm_cfg=dict(eps=1e-06)),\n"
    "    decode_head=dict(num_heads=2), data_preprocessor=dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0]),\n"
    "    test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(48, 48)))\n"
)
NAMES = ["os system", "posix system", "builtins eval", "builtins getattr", "subprocess Popen", "lab Thing", "lab run"]
NAMES += ["collections OrderedDict", "collections defaultdict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"]
NAMES += ["torch Tensor", "torch Size", "numpy ndarray", "numpy.core.multiarray _reconstruct", "argparse Namespace"]
NAMES += ["torch._utils _rebuild_parameter", "torch._utils _rebuild_meta_tensor_no_storage", "torch FloatTensor"]


def any_value(random: random.Random, depth: int = 0) -> Any:
    """A value of JSON."""
    scalars = [
        None,
        True,
        0,
        -1,
        3,
        10**9,
        10**30,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "mask",
        "x" * 5000,
    ]
    if depth < 3 and random.random() < 0.35:
        items = [any_value(random, depth + 1) for _ in range(random.randrange(4))]
        return items if random.random() < 0.5 else {str(index): item for index, item in enumerate(items)}
    return random.choice(scalars)


def damaged(content: bytes, random: random.Random) -> bytes:
    """Bytes with some of them changed, left out, doubled, or cut off."""
    changed = bytearray(content)
    for _ in range(random.randrange(1, 9)):
        at = random.randrange(len(changed) + 1)
        match random.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                del changed[at : at + random.randrange(1, 9)]
            case 2:
                changed[at:at] = changed[at : at + random.randrange(1, 65)]
            case 3:
                changed[at : at + 8] = struct.pack("<Q", random.choice([0, 1 << 31, 1 << 62, (1 << 64) - 1]))
            case _:
                changed[at:at] = bytes([random.randrange(256)]) * random.randrange(1, 5)
    return bytes(changed[: random.randrange(len(changed) + 1)] if random.random() < 0.2 else changed)


def pickled(random: random.Random, marker: Path) -> bytes:
    """A pickle of random operations; some of them call what they find."""
    plain = (b"(", b"t", b"\x85", b"\x86", b"\x87", b"}", b"]", b")", b"N", b"R", b"\x81", b"b", b"s", b"u", b"a", b"e")
    storage = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    out = b"\x80\x02" + random.choice([b"", b"}", b"]", b"("])
    text = str(marker).encode()
    for _ in range(random.randrange(1, 40)):
        name = random.choice(NAMES).replace(" ", "\n").encode()
        index = bytes([random.randrange(6)])
        number = struct.pack("<i", random.choice([0, 1, 1 << 20, (1 << 31) - 1, -1]))
        named = (b"c" + name + b"\n", b"X" + struct.pack("<I", len(text)) + text, b"X\x05\0\0\0hello")
        counted = (b"K" + index, b"J" + number, b"q" + index, b"h" + index, b"j" + number, b"r" + number)
        out += random.choice([*plain, *named * 2, *counted, b"Q", b"2", b"\x8a\x05\0\0\0\0\x40", storage])
    return out + b"."


def write_torch(random: random.Random, folder: Path) -> Path:
    """A damaged file of torch.save."""
    buffer = io.BytesIO()
    torch.save({"model": STATE, "args": {"lr": 0.1}}, buffer, _use_new_zipfile_serialization=random.random() < 0.7)
    (folder / "a.pth").write_bytes(damaged(buffer.getvalue(), random))
    return folder / "a.pth"


def write_pickle(random: random.Random, folder: Path) -> Path:
    """Random operations in a zip, or bare."""
    content = pickled(random, folder / "marker")
    save_pickle(folder / "a.pth", content) if random.random() < 0.8 else (folder / "a.pth").write_bytes(content)
    return folder / "a.pth"


def write_zip(random: random.Random, folder: Path) -> Path:
    """An archive of any entries, compressed or not."""
    kind = random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(folder / "a.pth", "w", kind) as archive:
        for name in random.sample(["a/data.pkl", "a/version", "a/data/0", "a/byteorder", "b/data.pkl", "../x"], 3):
            archive.writestr(name, random.choice([b"3\n", b"\x80\x02}.", bytes(1 << 20), b"little", b""]))
    return folder / "a.pth"


def write_state(random: random.Random, folder: Path) -> Path:
    """A state dict with tensors left out, misshapen, expanded, renamed, or of another dtype."""
    state: dict[Any, Any] = dict(STATE)
    for key in random.sample(list(state), random.randrange(1, 4)):
        tensor = state.pop(key)
        others = [tensor.flatten(), tensor.to(torch.int32), torch.zeros(1).expand(1 << 12, 1 << 12), torch.empty(0), 3]
        others += [
            tensor[..., None],
            tensor.to("meta"),
            tensor.to_sparse(),
            None,
            tensor.bfloat16(),
            torch.nan * tensor,
        ]
        if random.random() < 0.8:
            state[random.choice([key, key.upper(), f"module.{key}", 7, f"{key}.more", "x" * 10_000])] = random.choice(
                others
            )
    for _ in range(random.randrange(3)):
        state = {random.choice(["model", "state_dict", "ema", "module", "teacher", "any"]): state, "n": 1}
    torch.save(state, folder / "a.pth")
    return folder / "a.pth"


def write_ours(random: random.Random, folder: Path) -> Path:
    """Our folder with other values in config.json, or damaged."""
    MODEL.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in random.sample(list(config), random.randrange(1, 4)):
        config[name] = any_value(random)
    content = json.dumps(config).encode()
    (folder / "config.json").write_bytes(damaged(content, random) if random.random() < 0.2 else content)
    return folder


def write_safetensors(random: random.Random, folder: Path) -> Path:
    """Damaged weights beside config.json."""
    MODEL.save_pretrained(folder)
    content = (folder / "model.safetensors").read_bytes()
    at = random.choice([0, 8, len(content)])
    (folder / "model.safetensors").write_bytes(
        content[:at] + damaged(content[at : at + 2000], random) + content[at + 2000 :]
    )
    return folder


def write_index(random: random.Random, folder: Path) -> Path:
    """A damaged or random index of shards."""
    MODEL.save_pretrained(folder)
    path = folder / "model.safetensors.index.json"
    content: Any = {"weight_map": dict.fromkeys(STATE, "model.safetensors"), "metadata": any_value(random)}
    if random.random() < 0.5:
        content["weight_map"][random.choice(list(STATE))] = random.choice([any_value(random), path.name, "../x"])
    text = json.dumps(content if random.random() < 0.8 else any_value(random)).encode()
    path.write_bytes(damaged(text, random) if random.random() < 0.5 else text)
    if random.random() < 0.5:
        (folder / "config.json").unlink()
    return path


def write_official(random: random.Random, folder: Path) -> Path:
    """An official folder with a damaged variant.yml."""
    (folder / "checkpoint.pth").write_bytes((GOLDEN / "official_mask" / "checkpoint.pth").read_bytes())
    content = (GOLDEN / "official_mask" / "variant.yml").read_bytes()
    pieces = [
        b"&a ",
        b"*a",
        b"[",
        b"{",
        b"<<: ",
        b"!!python/tuple ",
        b"!!python/name:os.system",
        b"? ",
        b"\t",
        b": ",
        b"- ",
    ]
    for _ in range(random.randrange(1, 5)):
        at = random.randrange(len(content))
        content = content[:at] + random.choice(pieces) * random.choice([1, 1, 1, 3000]) + content[at:]
    (folder / "variant.yml").write_bytes(damaged(content, random) if random.random() < 0.5 else content)
    return folder


def write_mmseg(random: random.Random, folder: Path) -> Path:
    """A checkpoint of mmsegmentation with a damaged configuration or other classes."""
    content = torch.load(GOLDEN / "mmseg_mask" / "segmenter.pth", weights_only=True)
    text = damaged(CONFIG.encode(), random).decode("latin-1")
    for old in random.sample(["64", "2", "'slide'", "[1.0, 2.0, 3.0]", "1e-06", "dict("], 2):
        text = text.replace(
            old, random.choice([repr(any_value(random)), "(" * 500, "-" * 2000 + "1", "a.b()", "dict("])
        )
    meta = {"cfg": random.choice([text, text, any_value(random)]), "dataset_meta": any_value(random)}
    torch.save({**content, "meta": random.choice([meta, meta, any_value(random)])}, folder / "a.pth")
    return folder / "a.pth"


def write_distributed(random: random.Random, folder: Path) -> Path:
    """A folder of torch.distributed.checkpoint, damaged."""
    dcp.save({"model": STATE, "step": 3}, checkpoint_id=folder, no_dist=True)
    path = folder / random.choice([".metadata", "__0_0.distcp"])
    path.write_bytes(damaged(path.read_bytes(), random))
    return folder


KINDS: list[Callable[[random.Random, Path], Path]] = [
    *(write_torch, write_pickle, write_pickle, write_zip, write_state, write_ours, write_safetensors, write_index),
    *(write_official, write_mmseg, write_distributed),
]


def peak_memory() -> int:
    """Largest resident memory of this process in bytes."""
    resource = pytest.importorskip("resource", reason="needs the peak of a process's memory (Unix)")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def outcome(source: Path, folder: Path) -> str:
    """Load a source; return its result, and what is wrong with that after a colon."""
    start = time.perf_counter()
    try:
        sf.load(source)
        result, message = "loads", str(folder)
    except (CheckpointError, FileNotFoundError) as error:
        result, message = type(error).__name__, str(error)
    except BaseException as error:
        return f": {type(error).__name__}: {str(error)[:200]}"
    if time.perf_counter() - start > LONGEST_TIME:
        return ": it takes too long"
    if str(folder) not in message or len(message) > LONGEST_MESSAGE:
        return f": its message of {len(message)} characters is {message[:200]}"
    return ": it executed code" if (folder / "marker").exists() else result


@pytest.mark.filterwarnings("ignore")
def test_every_checkpoint_loads_or_gives_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts: collections.Counter[str] = collections.Counter()
    wrong, before, start = [], peak_memory(), time.perf_counter()
    for case in range(CASES):
        folder, write = tmp_path / f"case {case}", KINDS[case % len(KINDS)]
        folder.mkdir()
        source = write(random.Random(case), folder)
        result, _, problem = outcome(source, folder).partition(":")
        if problem:
            wrong.append(f"case {case}, {write.__name__}:{problem}")
        counts[f"{write.__name__} {result}"] += 1
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    taken, seconds = peak_memory() - before, time.perf_counter() - start
    with capsys.disabled():
        found = "".join(f"\n  {name}: {count}" for name, count in sorted(counts.items()))
        print(f"\n{CASES} checkpoints in {seconds:.0f} s, {taken / 1e6:.0f} MB more at the peak{found}")
    assert not wrong, "\n".join(wrong[:20])
    assert taken < MOST_MEMORY
    assert len(counts) > len(set(KINDS))  # some load, some do not
