"""Every kernel compiles for every target without a spill and within the chip's shared memory."""

from __future__ import annotations

import dataclasses
import math
import types

import pytest

from segmenter_fast.kernels.registry import HAS_TRITON, INTERPRET

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)
if INTERPRET:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled", allow_module_level=True)

from segmenter_fast.kernels import aot
from segmenter_fast.kernels.gpu.common import Specialization


def largest_tile(specialization: Specialization) -> int:
    sizes = (value for name, value in specialization.constexprs.items() if name.startswith("BLOCK"))
    return math.prod(value for value in sizes if isinstance(value, int))


def samples(arch: str) -> list[str]:
    """Of each kernel the build with the largest tiles."""
    largest: dict[str, Specialization] = {}
    for specialization in aot.shipped(arch):
        kernel = specialization.kernel.__name__
        if kernel not in largest or largest_tile(specialization) > largest_tile(largest[kernel]):
            largest[kernel] = specialization
    return [specialization.name for specialization in largest.values()]


def hold(wanted: list[tuple[str, str]]) -> None:
    builds = aot.build_all(wanted)
    assert {(one.arch, one.name) for one in builds} == set(wanted)
    assert not [f"{one.name} on {one.arch}: {one.defect}" for one in builds if one.defect]
    for one in builds:
        assert one.registers > 0
        assert sum(one.loads.values()) > 0, f"no global load was read from the disassembly of {one.name}"


def test_the_largest_builds_ship_without_spills() -> None:
    hold([(arch, name) for arch in aot.CHIPS for name in samples(arch)])


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.CHIPS)
def test_every_build_ships_without_spills(arch) -> None:
    hold([(arch, specialization.name) for specialization in aot.shipped(arch)])


def argmax(**changes) -> Specialization:
    first = next(s for s in aot.shipped("sm_90") if s.name.startswith("upsample_argmax"))
    return first._replace(**changes)


def test_a_launch_and_a_build_see_the_same_divisibility() -> None:
    # A stride divisible by 16 shows as an attribute of the argument; an odd one, or a size that varies, does not.
    text = aot.compile_kernel(argmax(), "sm_90").asm["ttir"]
    arguments = text[text.index("tt.func public") :].split("attributes {")[0]
    divisible = {part.split(":")[0].strip(" %") for part in arguments.split(", %") if "tt.divisibility = 16" in part}
    names = {name.split("(")[-1].strip(" %") for name in divisible}
    assert {"labels_ptr", "stride_mb", "stride_mh"} <= names
    assert not {"stride_mw", "num_classes", "height"} & names


def test_addresses_are_64_bit() -> None:
    text = aot.compile_kernel(argmax(), "sm_90").asm["ttir"]
    additions = [line for line in text.splitlines() if "tt.addptr" in line]
    assert additions
    assert all(line.split(" loc(")[0].rstrip().endswith(("i64", "i64>")) for line in additions), additions


def test_one_name_is_one_build(monkeypatch) -> None:
    same, other = argmax(), argmax(options={"num_warps": 8})
    module = types.SimpleNamespace(specializations=lambda arch: iter(builds))
    monkeypatch.setattr(aot, "MODULES", ("one",))
    monkeypatch.setattr(aot.importlib, "import_module", lambda *_: module)
    builds = [same, same]
    assert list(aot.shipped("sm_90")) == [same]
    builds = [same, other]
    with pytest.raises(ValueError, match=r"two different builds for sm_90 are called 'upsample_argmax"):
        list(aot.shipped("sm_90"))


def test_defects_are_named() -> None:
    good = aot.Build("kernel", "gfx942", 64, 0, 1024, {128: 2})
    assert not good.defect
    assert "3 spills" in dataclasses.replace(good, spills=3).defect
    assert "70000 bytes of shared memory, gfx942 has 65536" in dataclasses.replace(good, shared=70000).defect


def test_amd_loads_are_counted_by_width() -> None:
    text = """
        global_load_dwordx4 v[0:3], v4, s[0:1]
        buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
        buffer_load_dword v0, v4, s[0:3], 0 offen
        global_load_ushort v0, v1, s[0:1]
        buffer_load_short_d16_hi v0, v1, s[0:3], 0 offen
        s_load_dwordx2 s[0:1], s[4:5], 0x0
        .vgpr_count: 72
        .vgpr_spill_count: 3
        .sgpr_spill_count: 2
    """
    assert aot._read_amdgcn(text) == (
        72,
        3,
        {128: 2, 32: 1, 16: 2},
    )  # scalar registers spill into vector ones, not memory


def test_a_kernel_that_does_not_compile_is_a_defect() -> None:
    constexprs = argmax().constexprs | {"BLOCK_K": 3}  # no power of two
    failed = aot.build(argmax(constexprs=constexprs), "sm_90")
    assert "power of 2" in failed.defect


def test_a_forgotten_argument_is_an_error() -> None:
    signature = dict(argmax().signature)
    del signature["width"]
    with pytest.raises(ValueError, match=r"wrong: \['width'\]"):
        aot.compile_kernel(argmax(signature=signature), "sm_90")
