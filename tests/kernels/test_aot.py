"""Every kernel compiles as its launches do, for every target, without a spill and within the chip's shared memory."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import re
from typing import Any

import pytest

from segmenter_fast.kernels.registry import HAS_TRITON, INTERPRET

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)
if INTERPRET:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled", allow_module_level=True)

import triton
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from segmenter_fast.kernels import aot, gpu
from segmenter_fast.kernels.gpu.launches import Launch, record, representative_calls

SM_90 = aot.CHIPS["sm_90"].target


def constant(launch: Launch, name: str) -> Any:
    return launch.constants[launch.kernel.arg_names.index(name),]


def largest_tile(launch: Launch) -> int:
    return math.prod(constant(launch, name) for name in launch.kernel.arg_names if name.startswith("BLOCK"))


def samples(arch: str) -> dict[str, str]:
    """Of each kernel the build with the largest tiles."""
    largest: dict[str, Launch] = {}
    for launch in aot.shipped(arch):
        kernel = launch.kernel.__name__
        if kernel not in largest or largest_tile(launch) > largest_tile(largest[kernel]):
            largest[kernel] = launch
    return {kernel: launch.name for kernel, launch in largest.items()}


def rotated() -> list[tuple[str, str]]:
    """Samples of each kernel for four of the chips, of the next kernel for others: all chips at the cost of four."""
    chips = list(aot.CHIPS)
    found = {arch: samples(arch) for arch in chips}
    turns = [
        (kernel, chips[(turn + 2 * step) % len(chips)])
        for turn, kernel in enumerate(found["sm_90"])
        for step in range(4)
    ]
    return [(arch, found[arch][kernel]) for kernel, arch in turns if kernel in found[arch]]


def hold(wanted: list[tuple[str, str]]) -> None:
    builds = aot.build_all(wanted)
    assert {(one.arch, one.name) for one in builds} == set(wanted)
    assert not [f"{one.name} on {one.arch}: {one.defect}" for one in builds if one.defect]
    for one in builds:
        assert one.registers > 0
        assert sum(one.loads.values()) > 0, f"no global load was read from the disassembly of {one.name}"


def test_the_largest_builds_ship_without_spills() -> None:
    wanted = rotated()
    assert {arch for arch, _ in wanted} == set(aot.CHIPS)
    hold(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.CHIPS)
def test_every_build_ships_without_spills(arch) -> None:
    hold([(arch, launch.name) for launch in aot.shipped(arch)])


def kernels() -> set[str]:
    """Names of all functions in ``kernels.gpu`` that are launched."""
    modules = [importlib.import_module(f"{gpu.__name__}.{info.name}") for info in pkgutil.iter_modules(gpu.__path__)]
    functions = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return {function.__name__ for function in functions if function.__name__.endswith("_kernel")}


@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "gfx942"])
def test_builds_are_what_launches_bind(arch, monkeypatch) -> None:
    """Bind the arguments of each launch by Triton's binder: all kernels, signatures, constants and attributes."""
    target = aot.CHIPS[arch].target
    backend = make_backend(target)
    bound: dict[str, list[tuple[Any, ...]]] = {}
    run = JITFunction.run

    def bind(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        values, specialization, options = binder(**arguments)
        options, *build = kernel._pack_args(backend, arguments, values, specialization, options)
        given = [arguments[name] for name in ("maxnreg",) if name in arguments]
        given += [] if arguments.get("enable_fp_fusion", True) else [False]
        bound.setdefault(kernel.__name__, []).append((*build, options.num_warps, options.num_stages, *given))
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", bind)
    launches = aot.shipped(arch)
    missing = {name for name in kernels() if name.startswith("attention")} if arch == "sm_75" else set()
    assert {launch.kernel.__name__ for launch in launches} == set(bound) == kernels() - missing
    for launch in launches:
        build = (launch.signature, launch.constants, launch.attributes, *launch.options.values())
        assert build in bound[launch.kernel.__name__]


def test_the_tiles_are_those_of_the_architecture() -> None:
    names = {arch: {one.name for one in aot.shipped(arch)} for arch in ("sm_75", "sm_90", "sm_100", "gfx942")}
    assert "attention_forward D=64 bf16 ieee (128, 64, 8, 3)" in names["sm_90"]
    assert "attention_forward D=64 bf16 ieee (128, 128, 8, 3)" in names["sm_100"]
    assert "attention_forward D=64 bf16 ieee (64, 64, 4, 2)" in names["gfx942"]
    assert not any(name.startswith("attention") or "bf16" in name for name in names["sm_75"])


def test_unit_strides_are_constants() -> None:
    launches = [launch for launch in aot.shipped("sm_90") if launch.name.startswith("mask_scores")]
    assert {launch.kernel.__name__ for launch in launches} == {"mask_scores_kernel", "mask_scores_backward_kernel"}
    for launch in launches:
        strides = [kinds for name, kinds in launch.signature.items() if name.endswith("_strides")]
        assert len(strides) >= 2
        assert all(kinds[-1] == "constexpr" for kinds in strides)


def test_recording_leaves_triton_as_it_was() -> None:
    aot.shipped("sm_90")
    assert triton.knobs.runtime.jit_cache_hook is None
    assert triton.runtime.driver._active is None


def argmax() -> Launch:
    return next(launch for launch in aot.shipped("sm_90") if launch.name.startswith("upsample_argmax"))


def test_divisible_arguments_are_marked() -> None:
    """A stride divisible by 16 is marked; an odd one, or a size that varies, is not."""
    text = argmax().compile(aot.CHIPS["sm_90"].target).asm["ttir"]
    arguments = text[text.index("tt.func public") :].split("attributes {")[0].split(", %")
    divisible = [number for number, part in enumerate(arguments) if "tt.divisibility = 16" in part]
    assert divisible == [0, 1, 2, 3]  # masks_ptr, labels_ptr, stride_mb, stride_mh; not stride_mw or num_classes


def test_addresses_are_64_bit() -> None:
    text = argmax().compile(aot.CHIPS["sm_90"].target).asm["ttir"]
    additions = [line for line in text.splitlines() if "tt.addptr" in line]
    assert additions
    assert all(line.split(" loc(")[0].rstrip().endswith(("i64", "i64>")) for line in additions), additions


def operations(ptx: str, register: str) -> set[str]:
    """Operations that a register's value comes from, back to the loads."""
    written: dict[str, list[tuple[str, list[str]]]] = {}
    for line in ptx.splitlines():
        if match := re.match(r"\s*(?:@!?%p\d+\s+)?([a-z]\S*)\s+(.*%.*);", line):
            result, *sources = re.findall(r"%[a-z]+\d+", match[2])
            written.setdefault(result, []).append((match[1], [] if match[1].startswith("ld.") else sources))
    found, waiting, seen = set(), [register], {register}
    while waiting:
        for operation, sources in written.get(waiting.pop(), []):
            found.add(operation)
            waiting += set(sources) - seen
            seen |= set(sources)
    return found


@pytest.mark.parametrize(
    ("name", "bounds"), [("upsample_argmax 16x16 K=150 bf16 channels-last", 2), ("lattice_argmax of one K=2", 1)]
)
def test_a_nan_reaches_the_labels(name: str, bounds: int) -> None:
    """Maxima and minima drop a NaN on a GPU. They only bound finite scores.

    A sum of magnitudes that is NaN or infinite sends all others to a loop in which a NaN wins.
    """
    (launch,) = (launch for launch in aot.shipped("sm_90") if launch.name.startswith(name))
    ptx = launch.compile(aot.CHIPS["sm_90"].target).asm["ptx"]
    guards = re.findall(r"setp\.equ\.f32\s+%p\d+, (%\w+), 0f7F800000;", ptx)  # true for NaN, too
    assert len(guards) == bounds
    for guard in guards:
        found = operations(ptx, guard)
        assert {"add.f32", "abs.f32"} <= found
        assert not [operation for operation in found if re.match(r"(min|max)\.f32", operation)]
    (exact,) = (block for block in re.split(r"^\$L__BB", ptx, flags=re.MULTILINE) if "setp.gtu.f32" in block)
    assert exact.count("setp.gtu.f32") == exact.count("setp.num.f32") == 8  # one for each logit of a thread
    assert not re.search(r"(min|max)\.f32", exact)


def test_a_nan_score_reaches_the_output_of_attention() -> None:
    """The maximum of a row drops NaN. Each exponent is a score less that maximum, so that the sum of the row is NaN."""
    name = "attention_forward D=16 bf16 ieee (64, 64, 4, 3)"
    (launch,) = (launch for launch in aot.shipped("sm_90") if launch.name == name)
    ptx = launch.compile(aot.CHIPS["sm_90"].target).asm["ptx"]
    scores = dict(re.findall(r"^\s+(?:sub|fma\.rn)\.f32\s+(%\w+), (%\w+),", ptx, re.MULTILINE))
    exponents = [scores[register] for register in re.findall(r"ex2\.approx\S*\s+%\w+, (%\w+);", ptx)]
    plain = [register for register in exponents if "max.f32" not in operations(ptx, register)]
    assert "max.NaN" not in ptx
    assert len(plain) >= 64 * (64 + 16) // 128  # scores of a thread, in the loop and before it; others shrink the sum


def test_one_name_is_one_build() -> None:
    layouts = {label: call for label, call in representative_calls("sm_90") if label.startswith("1x1 K=150")}
    narrow, wide = layouts["1x1 K=150 bf16 channels-last"], layouts["1x1 K=150 fp32 channels-last"]
    twice = record(SM_90, iter([("label", narrow), ("other label", narrow)]))
    assert [launch.name for launch in twice] == ["upsample_argmax label (1, 1, 256, 1, 3)"]
    with pytest.raises(ValueError, match=r"have one name: upsample_argmax label \(1, 1, 256, 1, 3\)"):
        record(SM_90, iter([("label", narrow), ("label", wide)]))


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
    # Scalar registers spill into vector ones, not memory.
    assert aot._read_amdgcn(text) == (72, 3, {128: 2, 32: 1, 16: 2})


def test_asynchronous_copies_are_counted_by_width() -> None:
    (name,) = (one.name for one in aot.shipped("sm_90") if one.name.startswith("mask_scores K=150 bf16"))
    (measured,) = aot.build_all([("sm_90", name)])
    assert measured.loads[128] == 8  # patches and classes, 16 bytes at a time


def test_a_kernel_that_does_not_compile_is_a_defect() -> None:
    launch = argmax()
    constants = launch.constants | {(launch.kernel.arg_names.index("BLOCK_K"),): 3}  # no power of two
    failed = aot.build(launch._replace(constants=constants), "sm_90")
    assert "power of 2" in failed.defect
