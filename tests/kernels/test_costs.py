"""Static costs: what is read from machine code, and the bounds that the builds for sm_90 hold. No bound is a time."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest

from segmenter_fast.kernels.registry import HAS_TRITON, INTERPRET

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)
if INTERPRET:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled", allow_module_level=True)

from segmenter_fast.benchmarks import tune
from segmenter_fast.kernels import aot, costs, problems, sass, source
from segmenter_fast.kernels.gpu.common import TRITON_3_6

holds = pytest.mark.skipif(TRITON_3_6, reason="needs Triton 3.7: with 3.6, whose builds spill, some launches differ")

SOURCE = """
def kernel(n, near, BLOCK):
    full = n // BLOCK * BLOCK
    if near:
        x = 1
    else:
        x = 2
    for start in tl.range(0, full, BLOCK):
        for inner in range(4):
            x += start
    while x < n:
        x += 1
"""
# if: .L_then and .L_join; an outer loop, its inner loop unrolled by 2; a while loop; a subroutine called twice.
CODE = """
kernel:
	//## File "/a/kernels/gpu/fake.py", line 3
        /*0000*/                   CALL.REL.NOINC `($divide) ;
	//## File "/a/kernels/gpu/fake.py", line 4
        /*0010*/              @!P0 BRA `(.L_else) ;
	//## File "/a/kernels/gpu/fake.py", line 5
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/                   BRA `(.L_join) ;
.L_else:
	//## File "/a/kernels/gpu/fake.py", line 7
        /*0040*/                   MUFU.EX2 R1, R2 ;
        /*0050*/                   MUFU.EX2 R1, R2 ;
.L_join:
.L_outer:
	//## File "/a/kernels/gpu/fake.py", line 8
        /*0060*/                   DEPBAR.LE SB0, 0x2 ;
        /*0070*/                   IADD3 R4, R4.reuse, 0x20, RZ ;
        /*0080*/                   ISETP.GE.AND P1, PT, R4, R9, PT ;
.L_inner:
	//## File "/a/kernels/gpu/fake.py", line 9
        /*0090*/                   UIADD3 UR5, UR5, 0x2, URZ ;
        /*00a0*/                   UISETP.GE.AND UP0, UPT, UR5, 0x4, UPT ;
	//## File "/a/kernels/gpu/fake.py", line 10
        /*00b0*/               @P2 LDGSTS.E.BYPASS.128 [R143], desc[UR16][R4.64] ;
        /*00c0*/                   LDGDEPBAR ;
        /*00d0*/                   DEPBAR.LE SB0, 0x2 ;
        /*00e0*/                   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR24], RZ, !UPT ;
        /*00f0*/                   BRA.U !UP0, `(.L_inner) ;
	//## File "/a/kernels/gpu/fake.py", line 8
        /*0100*/              @!P1 BRA `(.L_outer) ;
.L_while:
	//## File "/a/kernels/gpu/fake.py", line 12
        /*0110*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0120*/               @P3 BRA `(.L_while) ;
        /*0130*/                   CALL.REL.NOINC `($divide) ;
        /*0140*/                   BRA.DIV UR4, `(.L_rare) ;
        /*0150*/                   EXIT ;
.L_rare:
        /*0160*/                   FADD R1, R1, R2 ;
        /*0170*/                   EXIT ;
$divide:
        /*0180*/                   I2F.U64.RP R4, R8 ;
        /*0190*/                   RET.REL.NODEC R2 `(kernel) ;
.L_end:
        /*01a0*/                   BRA `(.L_end);
"""


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> Any:
    function = ast.parse(SOURCE).body[0]
    found = [(function, one) for one in ast.walk(function) if isinstance(one, ast.For | ast.While | ast.If)]
    monkeypatch.setattr(source, "_functions", dict)
    monkeypatch.setattr(source, "nodes", lambda file: found if file == "fake.py" else [])

    def make(**values: Any) -> costs.Flow:
        return costs.Flow(sass.Program(CODE), source.Values(values))

    return make


def count(flow: costs.Flow, base: str) -> float:
    return sum(
        weight for block, weight in flow.weights.items() for one in flow.instructions([block]) if one.base == base
    )


KNOWN = {"n": 100, "BLOCK": 32, "x < n": 5}


def test_blocks_run_as_often_as_the_source_says(flow) -> None:
    found = flow(near=1, **KNOWN)
    assert [(header, passes) for _, header, passes in found.loops] == [
        ("kernel: for inner in range(4)", 2),
        ("kernel: while x < n", 5),
        ("kernel: for start in tl.range(0, full, BLOCK)", 3),
    ]
    wanted = {"FADD": 1, "MUFU": 0, "IADD3": 3, "HGMMA": 6, "BAR": 5, "I2F": 2, "CALL": 2, "EXIT": 1}
    assert {base: count(found, base) for base in wanted} == wanted


def test_unknown_branches_count_on_both_sides(flow) -> None:
    found = flow(**KNOWN)
    assert (count(found, "FADD"), count(found, "MUFU")) == (1, 2)
    found = flow(near=0, **KNOWN)
    assert (count(found, "FADD"), count(found, "MUFU")) == (0, 2)


def test_means_over_programs_are_fractions(flow) -> None:
    assert count(flow(near=1, full=48.0, **KNOWN), "IADD3") == 1.5


def test_a_loop_without_a_count_is_named(flow) -> None:
    with pytest.raises(LookupError, match="x in x < n of kernel"):
        flow(near=1, n=100, BLOCK=32)


def test_cycles_and_loads_of_a_pass(flow) -> None:
    found = flow(near=1, **KNOWN)
    loop, header, passes = found.loops[0]
    cost = costs.loop_cost(found.instructions(loop.blocks), header, passes, {})
    assert cost["instructions"] == 7
    assert cost["cycles"] == {"issue": 7, "lsu": 4, "tensor": 32}
    assert cost["mma"] == {"HGMMA": 1}
    assert cost["async_loads"] == {128: 1}
    assert cost["prefetch"] == 2
    assert (cost["barriers"], cost["spills"]) == (0, 0)


def test_pipes() -> None:
    def rate(name: str) -> tuple[str, float]:
        return sass.Instruction("", name, "", None).rate

    assert rate("FFMA.FTZ") == ("fma", 1)
    assert rate("IMAD.WIDE.U32") == ("fma", 2)
    assert rate("LOP3.LUT") == ("alu", 2)
    assert rate("MUFU.EX2") == ("xu", 8)
    assert rate("SHFL.BFLY") == ("lsu", 4)
    assert rate("UIADD3") == ("", 0)


# Microseconds of issue that a problem's launches take together, at most.
BOUNDS = {
    "cross-entropy and gradient, K=150, patch 16": 215,
    "cross-entropy and gradient, K=150, patch 8": 290,
    "cross-entropy and gradient, K=19, patch 16": 50,
    "softmax, K=150, patch 16": 180,
    "softmax backward, K=150, patch 16": 300,
    "argmax, smooth, 2 candidates, K=150, patch 16": 10,
    "argmax, smooth, 2 candidates, K=150, patch 8": 34,
    "argmax, noise, K=150, patch 16": 40,
    "attention with a bias": 48,
    "merge tokens, 1024 of 384": 1.9,
    "merge tokens, 1024 of 768": 2.7,
    "merge tokens, 4096 of 384": 13,
}


# Instructions a logit in a loop over classes, at most.
CLASS_LOOPS = {
    "cross-entropy and gradient, K=150, patch 16": 14,
    "cross-entropy and gradient, K=150, patch 8": 14,
    "cross-entropy and gradient, K=19, patch 16": 14,
    "softmax, K=150, patch 16": 14,
    "softmax backward, K=150, patch 16": 20,
    "votes of two lattices, K=150, 512 x 512": 25,
}
# By problem and kernel: instruction of the products in the main loop, tiles that are on their way while it waits, and
# the most registers of a thread. Class scores have 32 patches to a tile; products that are not fused take registers.
PRODUCTS = {
    "attention": {"attention_forward_kernel": ("HGMMA", 1, 128)},
    "attention backward": {
        "attention_backward_queries_kernel": ("HGMMA", 1, 128),
        "attention_backward_keys_kernel": ("HGMMA", 1, 168),  # room for three programs of 4 warps
    },
    "mask scores, K=150": {"mask_scores_kernel": ("HMMA", 0, 168)},
}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return {problem["problem"]: problem for problem in problems.measure()}


def loops(problem: dict[str, Any], kernel: str = "") -> list[dict[str, Any]]:
    found = [loop for one in problem["launches"] if kernel in one["kernel"] for loop in one["loops"]]
    assert found
    return found


@holds
def test_bounds_hold(measured) -> None:
    found = {name: problems.issue_us(measured[name]) for name in BOUNDS}
    assert not {name: us for name, us in found.items() if us > BOUNDS[name]}
    assert not [name for name, problem in measured.items() if any(one["spills"] for one in problem["launches"])]


@holds
def test_no_class_loop_waits(measured) -> None:
    for name in CLASS_LOOPS:
        found = [loop for loop in loops(measured[name]) if "per_logit" in loop]
        assert len(found) >= 2, name
        assert max(measured[name]["launches"], key=lambda one: one["us"]["issue"])["warps_sm"] >= 12, name
        waits = [one for one in measured[name]["launches"] if one["warps_sm"] > one["programs_sm"]]
        assert not [loop for one in waits for loop in one["loops"] if "per_logit" in loop and loop["barriers"]], name
        assert max(loop["per_logit"] for loop in found) <= CLASS_LOOPS[name], name


def test_matrix_products_use_the_tensor_cores_and_load_ahead(measured) -> None:
    for name, kernels in PRODUCTS.items():
        assert {one["kernel"] for one in measured[name]["launches"]} == kernels.keys()
        for kernel, (product, prefetch, registers) in kernels.items():
            (main,) = (loop for loop in loops(measured[name], kernel) if loop["passes"] > 1)
            assert all(one["registers"] <= registers for one in measured[name]["launches"] if one["kernel"] == kernel)
            assert main["mma"].get(product, 0) > 0
            assert main["async_loads"][128] > 0
            assert main["prefetch"] >= prefetch


def test_tiles_of_64_patches_use_the_tensor_cores_of_four_warps() -> None:
    (launch,) = (one for one in aot.shipped("sm_90") if one.name.startswith("mask_scores K=19 bf16"))
    assert launch.arguments["BLOCK_N"] == 64
    assert any(loop["mma"].get("HGMMA") for loop in costs.cost(launch, {})["loops"])


def test_the_table_calls_no_bound_a_time(measured) -> None:
    text = problems.table(list(measured.values()))
    assert text.startswith("Static bound, not a time")
    assert all(name in text for name in measured)


def test_costs_are_written_as_json(tmp_path, capsys) -> None:
    path = tmp_path / "costs.json"
    assert aot.main(["--costs", "--only", "argmax, smooth, 2 candidates, K=150, patch 8", "--json", str(path)]) == 0
    (problem,) = json.loads(path.read_text())
    assert problem["launches"][0]["us"]["issue"] > 0
    assert problem["problem"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--json costs.json", "--json is the file of --costs"),
        ("--costs --json nowhere/costs.json", "there is no folder nowhere"),
        ("--costs --only cross_entropy", "no problem's name contains 'cross_entropy'"),
        ("--arch sm_75 --only attention", "no build for sm_75 has 'attention' in its name"),
        ("--jobs 0", "--jobs must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        aot.main(arguments.split())
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_tuner_asks_for_the_same_bound(measured) -> None:
    name = "argmax, smooth, 2 candidates, K=150, patch 8"
    (call,) = (problem.call for problem in problems.problems() if problem.name == name)
    bound = sum(max(one["us"].values()) for one in measured[name]["launches"])
    assert tune.static_bound(call) == pytest.approx(1e-3 * bound)

    def fails() -> None:
        raise RuntimeError("out of resources")

    assert tune.static_bound(fails) is None
