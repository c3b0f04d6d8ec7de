"""Triton 3.6, which PyTorch 2.11 brings, compiles every kernel without a spill for three generations of NVIDIA chips.

It needs an environment of its own: ``make triton-3.6`` installs it into a folder, or TRITON_3_6 names one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("TRITON_3_6", Path(__file__).parents[2] / "build/triton-3.6"))
if not (FOLDER / "triton").is_dir():
    pytest.skip(f"needs Triton 3.6 in {FOLDER} (make triton-3.6, or TRITON_3_6)", allow_module_level=True)

# Builds that spilled before their launches made an exception for this version.
FAST = [
    ("sm_90", "cross_entropy K=19 P=16 bf16 g"),
    ("sm_90", "lattice_votes of votes K=150 fp32"),
    ("sm_90", "lattice_votes of votes K=150 fp64"),
    ("sm_80", "mask_scores_backward K=150 fp32"),
    ("sm_90", "attention_backward_keys D=16 fp32 ieee bias"),
    ("sm_90", "attention_backward_keys D=64 fp32 tf32 bias"),
    ("sm_100", "attention_backward_keys D=64 fp32 tf32 bias"),
    ("sm_80", "attention_forward D=16 fp32 ieee bias"),
    ("sm_80", "best_match D=384 fp32"),
]
PROGRAM = """
import json, sys
import triton
from segmenter_fast.kernels import aot

if __name__ == "__main__":
    parts = json.loads(sys.argv[1])
    wanted = [(arch, one.name) for arch, part in parts for one in aot.shipped(arch) if one.name.startswith(part)]
    defects = [f"{one.name} on {one.arch}: {one.defect}" for one in aot.build_all(wanted) if one.defect]
    print(json.dumps([triton.__version__, len(wanted), defects]))
"""


def hold(parts: list[tuple[str, str]], tmp_path: Path) -> int:
    """Build all launches whose names begin as ``parts`` say; return their number."""
    (program := tmp_path / "builds.py").write_text(PROGRAM)  # a file, because builds run in processes of their own
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *filter(None, [variables.get("PYTHONPATH")])])
    command = [sys.executable, str(program), json.dumps(parts)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, count, defects = json.loads(done.stdout.splitlines()[-1])
    assert version.startswith("3.6.")
    assert not defects
    return count


def test_builds_that_spilled_do_not(tmp_path: Path) -> None:
    assert hold(FAST, tmp_path) >= len(FAST)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_build_ships_without_spills(arch: str, tmp_path: Path) -> None:
    assert hold([(arch, "")], tmp_path) > 100
