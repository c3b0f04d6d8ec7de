"""Trainings killed at random moments end with the bits of unbroken ones; ``FUZZ_CASES=10000`` for long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import killed

CHAINS = max(int(os.environ.get("FUZZ_CASES", "150")) // 50, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork (Unix)")
def test_a_training_killed_many_times_equals_an_unbroken_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    program = [sys.executable, killed.__file__, str(CHAINS), str(tmp_path)]
    paths = os.pathsep.join([str(Path(killed.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(program, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        counts = ", ".join(f"{count} {name}" for name, count in result["counts"].items())
        print(f"\n{counts} in {time.perf_counter() - start:.0f} s, {len(result['wrong'])} wrong")
    assert not result["wrong"], "\n".join(result["wrong"])
    assert result["counts"]["killed"] >= CHAINS // 2
